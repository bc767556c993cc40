#include <doctest/doctest.h>

#include <cmath>
#include <random>
#include <stdexcept>
#include <vector>

#include "aer/group_statistics.hpp"
#include "aer/partition.hpp"

using namespace aer;

TEST_CASE("group statistics of a hand-derived example") {
    const std::vector<std::int64_t> ids{7, -3, 7, 7, 7};
    const std::vector<double> rewards{1.0, 1.0, 0.0, 0.0, 1.0};
    const GroupStatistics out = group_statistics({ids.data(), 5}, {rewards.data(), 5}, 0.0, true);
    CHECK(out.group_ids == std::vector<std::int64_t>{7, -3});
    CHECK(out.counts == std::vector<std::int64_t>{4, 1});
    CHECK(out.successes == std::vector<std::int64_t>{2, 1});
    CHECK(out.std[0] == doctest::Approx(std::sqrt(1.0 / 3.0)));
    CHECK(out.advantage[0] == doctest::Approx(0.5 * std::sqrt(3.0)));
    CHECK(out.advantage[1] == 0.0);
}

TEST_CASE("group statistics refuse what they cannot mean") {
    const std::vector<std::int64_t> ids{1, 1};
    const std::vector<double> rewards{1.0, std::nan("")};
    CHECK_THROWS_AS(group_statistics({ids.data(), 2}, {rewards.data(), 2}, 0.0, true), std::invalid_argument);
    CHECK_THROWS_AS(group_statistics({ids.data(), 2}, {rewards.data(), 1}, 0.0, true), std::invalid_argument);
    CHECK_THROWS_AS(group_statistics({ids.data(), 1}, {rewards.data(), 1}, -1.0, true), std::invalid_argument);
}

TEST_CASE("partitions use every part and keep equal sizes when asked") {
    std::mt19937_64 random(3);
    for (int round = 0; round < 200; ++round) {
        const std::size_t n = 1 + random() % 40;
        const std::size_t num_parts = 1 + random() % n;
        std::vector<std::int64_t> weights(n);
        for (std::int64_t& weight : weights) weight = static_cast<std::int64_t>(random() % 1000);
        for (const bool equal_size : {false, true}) {
            const std::vector<std::int64_t> parts =
                balanced_partition({weights.data(), n}, static_cast<std::int64_t>(num_parts), equal_size);
            std::vector<std::size_t> sizes(num_parts, 0);
            for (const std::int64_t part : parts) ++sizes.at(static_cast<std::size_t>(part));
            for (const std::size_t size : sizes) {
                REQUIRE(size >= 1);
                if (equal_size) REQUIRE((size == n / num_parts || size == (n + num_parts - 1) / num_parts));
            }
        }
    }
}

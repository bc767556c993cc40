#include <doctest/doctest.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <fstream>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "aer/ledger.hpp"
#include "aer/ledger_summary.hpp"

using namespace aer;

namespace {

struct Columns {
    std::vector<std::uint64_t> prompt_ids;
    std::vector<std::int64_t> attempts, successes;
    std::vector<double> entropy_sum;
    std::vector<std::int64_t> token_count;

    void add(std::uint64_t prompt_id, std::int64_t tries, std::int64_t wins) {
        prompt_ids.push_back(prompt_id);
        attempts.push_back(tries);
        successes.push_back(wins);
        entropy_sum.push_back(0.25 * static_cast<double>(tries));
        token_count.push_back(10 * tries);
    }
    LedgerBatch batch() const {
        return {{prompt_ids.data(), prompt_ids.size()},
                {attempts.data(), attempts.size()},
                {successes.data(), successes.size()},
                {entropy_sum.data(), entropy_sum.size()},
                {token_count.data(), token_count.size()}};
    }
};

Columns random_columns(std::uint32_t seed, std::size_t n, std::uint64_t num_prompts) {
    std::mt19937_64 random(seed);
    Columns columns;
    for (std::size_t i = 0; i < n; ++i) {
        const auto tries = static_cast<std::int64_t>(random() % 9);
        columns.add(splitmix64(random() % num_prompts), tries, static_cast<std::int64_t>(random() % 10) * tries / 9);
    }
    return columns;
}

std::string temporary_path(const char* name) { return "/tmp/aer_test_" + std::to_string(::getpid()) + "_" + name; }

}  // namespace

TEST_CASE("every prompt is found through all growth, with exact counts") {
    RecordTable table(0);
    std::map<std::uint64_t, std::uint32_t> expected;
    std::mt19937_64 random(1);
    for (int i = 0; i < 60000; ++i) {
        const std::uint64_t id = i % 3 == 0 ? static_cast<std::uint64_t>(i) : random();
        for (int k = 0; k < 2; ++k) {
            ++table.find_or_insert(id).attempts;
            ++expected[id];
        }
    }
    CHECK(table.size() == expected.size());
    for (const auto& [id, attempts] : expected) {
        REQUIRE(table.find(id) != RecordTable::kAbsent);
        REQUIRE(table.at(table.find(id)).attempts == attempts);
    }
    CHECK(table.find(0xDEADBEEF12345678ULL) == RecordTable::kAbsent);
    const std::vector<std::uint32_t> order = table.sorted_positions();
    for (std::size_t i = 1; i < order.size(); ++i) REQUIRE(table.at(order[i - 1]).prompt_id < table.at(order[i]).prompt_id);
    CHECK(static_cast<double>(table.nbytes()) / static_cast<double>(table.size()) < 64.0);
}

TEST_CASE("a prompt's decayed sums follow the formula") {
    Ledger ledger(0.5, 0);
    Columns early, late;
    early.add(42, 8, 6);
    late.add(42, 4, 1);
    ledger.update(early.batch(), 3);
    ledger.update(late.batch(), 5);
    const LedgerRows rows = ledger.export_rows();
    CHECK(rows.decayed_successes == std::vector<double>{2.5});
    CHECK(rows.decayed_failures == std::vector<double>{3.5});
    CHECK(rows.entropy_sum == std::vector<double>{3.0});
    const std::uint64_t id = 42;
    CHECK(ledger.posterior_mean({&id, 1}, {1.0, 1.0}, 5).front() == 3.5 / 8.0);
}

TEST_CASE("a refused batch changes nothing") {
    Ledger ledger(0.9, 0);
    const Columns good = random_columns(1, 500, 100);
    ledger.update(good.batch(), 7);
    Ledger before(0.9, 0);
    before.merge(ledger);
    Columns bad = random_columns(2, 500, 1000);
    CHECK_THROWS_AS(ledger.update(bad.batch(), 6), std::invalid_argument);
    bad.successes.back() = bad.attempts.back() + 1;
    CHECK_THROWS_AS(ledger.update(bad.batch(), 8), std::invalid_argument);
    CHECK(ledger.equals(before));
}

TEST_CASE("save and load are the identity; damage is found") {
    Ledger ledger(0.97, 0);
    for (int step = 0; step < 3; ++step) ledger.update(random_columns(static_cast<std::uint32_t>(step), 20000, 9000).batch(), step);
    const std::string path = temporary_path("ledger");
    ledger.save(path);
    CHECK(Ledger::load(path, 0.97)->equals(ledger));
    CHECK_THROWS_AS(Ledger::load(path, 0.5), std::invalid_argument);
    {
        std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
        file.seekp(1000);
        file.put('x');
    }
    CHECK_THROWS_AS(Ledger::load(path, std::nullopt), std::invalid_argument);
    std::remove(path.c_str());
    CHECK_THROWS_AS(Ledger::load(path, std::nullopt), std::system_error);
}

TEST_CASE("threads that update, read, merge and save one ledger lose nothing") {
    constexpr int kWriters = 3, kRounds = 15;
    Ledger shared(0.9, 0), serial(0.9, 0);
    const std::string path = temporary_path("threads");
    std::atomic<bool> done{false};
    std::vector<std::thread> writers, readers;
    for (int w = 0; w < kWriters; ++w)
        writers.emplace_back([&shared, w] {
            for (int r = 0; r < kRounds; ++r) {
                const Columns columns = random_columns(static_cast<std::uint32_t>(100 * w + r), 700, 3000);
                if (r % 2 == 0) {
                    shared.update(columns.batch(), 4);
                } else {
                    Ledger delta(0.9, 0);
                    delta.update(columns.batch(), 4);
                    shared.merge(delta);
                }
            }
        });
    readers.emplace_back([&] {
        while (!done) {
            const LedgerRows rows = shared.export_rows();
            for (std::size_t i = 0; i < rows.attempts.size(); ++i)
                if (rows.token_count[i] != 10 * rows.attempts[i]) throw std::logic_error("torn record");
        }
    });
    readers.emplace_back([&] {
        while (!done) {
            shared.save(path);
            top_k(shared, 5, Ranking::kHardest, {1.0, 1.0}, 4);
        }
    });
    for (std::thread& writer : writers) writer.join();
    done = true;
    for (std::thread& reader : readers) reader.join();
    std::remove(path.c_str());
    for (int w = 0; w < kWriters; ++w)
        for (int r = 0; r < kRounds; ++r) serial.update(random_columns(static_cast<std::uint32_t>(100 * w + r), 700, 3000).batch(), 4);
    CHECK(shared.equals(serial));
}

TEST_CASE("two ledgers that merge into each other do not deadlock") {
    Ledger one(1.0, 0), two(1.0, 0);
    one.update(random_columns(1, 50, 50).batch(), 0);
    std::thread forward([&] { for (int i = 0; i < 5; ++i) one.merge(two); });
    std::thread backward([&] { for (int i = 0; i < 5; ++i) two.merge(one); });
    forward.join();
    backward.join();
    CHECK(one.size() == two.size());
}

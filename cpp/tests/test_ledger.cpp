#include <doctest/doctest.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <fstream>
#include <map>
#include <memory>
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

TEST_CASE("every prompt is found through all growth, with exact counts, in the order of keys") {
    RecordTable table(0);
    std::map<std::uint64_t, std::uint32_t> expected;  // by key
    std::mt19937_64 random(1);
    for (int i = 0; i < 60000; ++i) {
        const std::uint64_t key = splitmix64(i % 3 == 0 ? static_cast<std::uint64_t>(i) : random());
        for (int k = 0; k < 2; ++k) {
            ++table.find_or_insert(key, 0).attempts;
            ++expected[key];
        }
    }
    CHECK(table.size() == expected.size());
    for (const auto& [key, attempts] : expected) {
        const Record* const record = table.find(key);
        REQUIRE(record != nullptr);
        REQUIRE(record->attempts == attempts);
    }
    CHECK(table.find(splitmix64(0xDEADBEEF12345678ULL)) == nullptr);
    auto next = expected.begin();
    table.for_each([&](const Record& record) { REQUIRE(record.key == (next++)->first); });
    CHECK(next == expected.end());
    CHECK(static_cast<double>(table.nbytes()) / static_cast<double>(table.size()) < 64.0);
}

TEST_CASE("keys that crowd at one end, and appended ones, are found") {
    for (const std::uint64_t first : {std::uint64_t{0}, UINT64_MAX - 999}) {
        std::vector<std::uint64_t> keys(1000);
        for (std::size_t i = 0; i < keys.size(); ++i) keys[i] = first + i;
        RecordTable appended(0), inserted(100);
        for (const std::uint64_t key : keys) appended.append(Record{key, 0.0, 0.0, 0, 0, 1, 0, 0});
        std::shuffle(keys.begin(), keys.end(), std::mt19937_64(2));
        for (const std::uint64_t key : keys) ++inserted.find_or_insert(key, 0).attempts;
        for (const RecordTable* table : {&appended, &inserted}) {
            CHECK(table->size() == keys.size());
            for (const std::uint64_t key : keys) {
                const Record* const record = table->find(key);
                REQUIRE(record != nullptr);
                REQUIRE(record->key == key);
                REQUIRE(record->attempts == 1);
            }
            CHECK(table->find(first + 1000) == nullptr);
            CHECK(table->find(UINT64_MAX / 2) == nullptr);
        }
    }
}

TEST_CASE("a batch gives the same ledger as its pieces") {
    constexpr std::size_t kPieces = 8, kSize = 2000;
    Ledger pieces(0.9, 0), whole(0.9, 50000);
    for (std::int64_t step = 0; step < 3; ++step) {
        Columns all;
        for (std::uint32_t piece = 0; piece < kPieces; ++piece) {
            const Columns columns = random_columns(10 * static_cast<std::uint32_t>(step) + piece, kSize, 9000);
            pieces.update(columns.batch(), step);
            for (std::size_t i = 0; i < kSize; ++i)
                all.add(columns.prompt_ids[i], columns.attempts[i], columns.successes[i]);
        }
        whole.update(all.batch(), step);
    }
    CHECK(whole.equals(pieces));
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
    const std::unique_ptr<Ledger> before = ledger.copy();
    Columns bad = random_columns(2, 500, 1000);
    CHECK_THROWS_AS(ledger.update(bad.batch(), 6), std::invalid_argument);
    bad.successes.back() = bad.attempts.back() + 1;
    CHECK_THROWS_AS(ledger.update(bad.batch(), 8), std::invalid_argument);
    CHECK(ledger.equals(*before));
}

TEST_CASE("save and load are the identity; damage is found") {
    Ledger ledger(0.97, 0);
    for (int step = 0; step < 3; ++step)
        ledger.update(random_columns(static_cast<std::uint32_t>(step), 20000, 9000).batch(), step);
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

TEST_CASE("threads that update, read, copy and save one ledger lose nothing") {
    constexpr int kWriters = 3, kRounds = 15;
    const double half = 0.5;
    Ledger shared(0.9, 0), serial(0.9, 0);
    const std::string path = temporary_path("threads");
    std::atomic<bool> done{false};
    std::vector<std::thread> writers, readers;
    for (int w = 0; w < kWriters; ++w)
        writers.emplace_back([&shared, w] {
            for (int r = 0; r < kRounds; ++r) {
                const Columns columns = random_columns(static_cast<std::uint32_t>(100 * w + r), 700, 3000);
                shared.update(columns.batch(), 4);
            }
        });
    readers.emplace_back([&] {
        while (!done) {
            const LedgerRows rows = shared.export_rows();
            for (std::size_t i = 0; i < rows.attempts.size(); ++i)
                if (rows.token_count[i] != 10 * rows.attempts[i]) throw std::logic_error("torn record");
        }
    });
    for (int saver = 0; saver < 2; ++saver)
        readers.emplace_back([&] {
            while (!done) {
                shared.save(path);
                Ledger::load(path, 0.9);  // whole, whoever saved it last
                const std::unique_ptr<Ledger> copy = shared.copy();
                if (copy->size() > 0) difficulty_quantiles(*copy, {&half, 1}, {1.0, 1.0}, 4);
            }
        });
    for (std::thread& writer : writers) writer.join();
    done = true;
    for (std::thread& reader : readers) reader.join();
    std::remove(path.c_str());
    for (int w = 0; w < kWriters; ++w)
        for (int r = 0; r < kRounds; ++r)
            serial.update(random_columns(static_cast<std::uint32_t>(100 * w + r), 700, 3000).batch(), 4);
    CHECK(shared.equals(serial));
}

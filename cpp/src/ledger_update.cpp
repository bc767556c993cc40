// The ledger's batch updates. A large batch is first partitioned by shard (one pass that counts, one that scatters),
// then applied shard by shard: a shard's records and index fit a core's cache, so that each line of the table travels
// between memory and core once per batch instead of once per entry, and threads own disjoint shards. A small batch is
// applied directly. All additions are exact (record.hpp), so that neither path nor number of threads shows in the
// result.
#include <algorithm>
#include <array>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <utility>
#include <vector>

#include "aer/ledger.hpp"
#include "aer/message.hpp"
#include "aer/parallel.hpp"

namespace aer {
namespace {

// Below this many entries per call neither partition nor threads pay for themselves.
constexpr std::size_t kPartitionFrom = 16384;
constexpr std::size_t kMaxThreads = 256;
constexpr std::size_t kShards = RecordTable::kShards;
// A shard of at most so many records fits a core's own cache; one entry per so many of them pays for fetching it whole.
constexpr std::size_t kCachedRecords = 8192;
constexpr std::size_t kDensity = 3;

struct Added {
    std::int64_t entropy_sum;
    std::uint32_t attempts, successes, token_count;
};

void add(Record& record, const Added& added, std::int64_t step, const Decay& decay) {
    const double power = decay.power(record.last_step < 0 ? 0 : step - record.last_step);
    record.decayed_successes = Decay::decayed(record.decayed_successes, power) + added.successes;
    record.decayed_failures = Decay::decayed(record.decayed_failures, power) + (added.attempts - added.successes);
    record.entropy_sum += added.entropy_sum;
    record.token_count += added.token_count;
    record.attempts += added.attempts;
    record.successes += added.successes;
    record.last_step = static_cast<std::int32_t>(step);
}

// A batch as seen by the partition: an `Entry` is what is scattered, and it gives back the key and what is added.
struct Aggregates {
    struct Entry {
        std::uint64_t key;
        Added added;
    };
    const LedgerBatch& batch;

    std::size_t size() const { return batch.prompt_ids.size; }
    std::uint64_t key(std::size_t i) const { return splitmix64(batch.prompt_ids[i]); }
    Entry entry(std::size_t i) const {
        return {key(i),
                {entropy_units(batch.entropy_sum[i]), static_cast<std::uint32_t>(batch.attempts[i]),
                 static_cast<std::uint32_t>(batch.successes[i]), static_cast<std::uint32_t>(batch.token_count[i])}};
    }
    static std::uint64_t key_of(const Entry& entry, std::size_t) { return entry.key; }
    static Added added_of(const Entry& entry) { return entry.added; }
};

struct Verdicts {
    using Entry = std::uint64_t;  // the key without its highest byte, which names the shard, and below it the verdict
    const VerdictBatch& batch;

    std::size_t size() const { return batch.prompt_ids.size; }
    std::uint64_t key(std::size_t i) const { return splitmix64(batch.prompt_ids[i]); }
    Entry entry(std::size_t i) const { return key(i) << 8 | Entry{batch.solved[i] != 0}; }
    static std::uint64_t key_of(Entry entry, std::size_t shard) { return entry >> 8 | std::uint64_t{shard} << 56; }
    static Added added_of(Entry entry) { return {0, 1, static_cast<std::uint32_t>(entry & 1), 0}; }
};

// Entries grouped by shard, within a shard in the batch's order.
template <class Batch>
struct Partition {
    using Entry = typename Batch::Entry;

    Partition(const Batch& batch, std::size_t num_threads) : entries(new Entry[batch.size()]) {
        const std::size_t n = batch.size();
        std::vector<std::array<std::size_t, kShards>> next(num_threads);
        const auto slice = [&](std::size_t thread, auto&& visit) {
            for (std::size_t i = n * thread / num_threads; i < n * (thread + 1) / num_threads; ++i) visit(i);
        };
        run_parallel(num_threads, [&](std::size_t thread) {
            std::array<std::size_t, kShards> count{};
            slice(thread, [&](std::size_t i) { ++count[RecordTable::shard_of(batch.key(i))]; });
            next[thread] = count;
        });
        std::size_t total = 0;
        for (std::size_t shard = 0; shard < kShards; ++shard) {
            begin[shard] = total;
            for (auto& count : next) total += std::exchange(count[shard], total);
        }
        begin[kShards] = total;
        run_parallel(num_threads, [&](std::size_t thread) {
            std::array<std::size_t, kShards> at = next[thread];
            slice(thread, [&](std::size_t i) { entries[at[RecordTable::shard_of(batch.key(i))]++] = batch.entry(i); });
        });
    }

    std::unique_ptr<Entry[]> entries;
    std::array<std::size_t, kShards + 1> begin;
};

// Entries of one shard, in blocks: index lines, then records, then the arithmetic, so that latencies overlap. They are
// latencies of the core's own cache where a dense batch makes it worth to fetch the shard whole beforehand.
template <class Batch>
void apply(RecordShard& shard, std::size_t number, Span<const typename Batch::Entry> entries, std::int64_t step,
           const Decay& decay) {
    constexpr std::size_t kBlock = 64;
    std::array<Record*, kBlock> records;
    if (shard.size() <= kCachedRecords && shard.size() <= kDensity * entries.size) shard.touch_all();
    for (std::size_t start = 0; start < entries.size; start += kBlock) {
        const auto* const first = entries.begin() + start;
        const std::size_t n = std::min(kBlock, entries.size - start);
        for (std::size_t i = 0; i < n; ++i) shard.prefetch_bucket(Batch::key_of(first[i], number));
        for (std::size_t i = 0; i < n; ++i) records[i] = shard.probable(Batch::key_of(first[i], number));
        for (std::size_t i = 0; i < n; ++i) {
            const std::uint64_t key = Batch::key_of(first[i], number);
            Record* record = records[i];
            if (record == nullptr || record->key != key) record = &shard.find_or_insert(key);
            add(*record, Batch::added_of(first[i]), step, decay);
        }
    }
}

template <class Batch>
void apply_all(RecordTable& table, const Batch& batch, std::int64_t step, std::size_t num_threads, const Decay& decay) {
    if (batch.size() < kPartitionFrom) {
        for (std::size_t i = 0; i < batch.size(); ++i) {
            constexpr std::size_t kAhead = 16;
            if (i + 2 * kAhead < batch.size()) {
                const std::uint64_t far = batch.key(i + 2 * kAhead), near = batch.key(i + kAhead);
                table.shard(RecordTable::shard_of(far)).prefetch_bucket(far);
                table.shard(RecordTable::shard_of(near)).probable(near);
            }
            add(table.find_or_insert(batch.key(i)), Batch::added_of(batch.entry(i)), step, decay);
        }
        return;
    }
    const Partition<Batch> partition(batch, num_threads);
    // A shard belongs to the thread in whose share of the batch its entries start.
    const auto owner = [&](std::size_t shard) { return partition.begin[shard] * num_threads / batch.size(); };
    run_parallel(num_threads, [&](std::size_t thread) {
        for (std::size_t shard = 0; shard < kShards; ++shard) {
            const std::size_t begin = partition.begin[shard], size = partition.begin[shard + 1] - begin;
            if (size == 0 || owner(shard) != thread) continue;
            apply<Batch>(table.shard(shard), shard, {partition.entries.get() + begin, size}, step, decay);
        }
    });
}

[[noreturn]] void refuse_entry(const LedgerBatch& batch) {
    for (std::size_t i = 0; i < batch.prompt_ids.size; ++i) {
        const auto fail = [&](const auto&... what) {
            throw std::invalid_argument(message("update: prompt ", batch.prompt_ids[i], " (index ", i, "): ", what...));
        };
        if (batch.attempts[i] < 0 || batch.attempts[i] > kCountMax)
            fail("attempts=", batch.attempts[i], " must be in [0, ", kCountMax, "]");
        if (batch.successes[i] < 0 || batch.successes[i] > batch.attempts[i])
            fail("successes=", batch.successes[i], " must be in [0, attempts=", batch.attempts[i], "]");
        if (!(batch.entropy_sum[i] >= 0.0 && batch.entropy_sum[i] <= kEntropyMax * kEntropyUnit))
            fail("entropy_sum=", batch.entropy_sum[i], " must be in [0, ", kEntropyMax * kEntropyUnit, "] nats");
        if (batch.token_count[i] < 0 || batch.token_count[i] > kCountMax)
            fail("token_count=", batch.token_count[i], " must be in [0, ", kCountMax, "]");
    }
    throw std::logic_error("refuse_entry: no entry is bad");
}

// The batch's sums; throws for an entry out of range. Without branches, so that it vectorises.
LedgerTotals checked_totals(const LedgerBatch& batch) {
    const std::size_t n = batch.prompt_ids.size;
    if (batch.attempts.size != n || batch.successes.size != n || batch.entropy_sum.size != n ||
        batch.token_count.size != n)
        throw std::invalid_argument(
            "update: prompt_ids, attempts, successes, entropy_sum and token_count must have one length");
    constexpr std::uint64_t kHigh = ~std::uint64_t{kCountMax};
    std::uint64_t bad = 0, attempts = 0, tokens = 0;
    for (std::size_t i = 0; i < n; ++i) {
        const auto tries = static_cast<std::uint64_t>(batch.attempts[i]),
                   wins = static_cast<std::uint64_t>(batch.successes[i]);
        bad |= (tries | wins | (tries - wins) | static_cast<std::uint64_t>(batch.token_count[i])) & kHigh;
        attempts += tries;
        tokens += static_cast<std::uint64_t>(batch.token_count[i]);
    }
    double nats = 0.0;
    bool in_range = true;
    for (std::size_t i = 0; i < n; ++i) {
        in_range &= batch.entropy_sum[i] >= 0.0;
        in_range &= batch.entropy_sum[i] <= kEntropyMax * kEntropyUnit;
        nats += batch.entropy_sum[i];
    }
    if (bad != 0 || !in_range) refuse_entry(batch);
    return {attempts, tokens, nats};
}

std::size_t checked_threads(std::int64_t num_threads) {
    if (num_threads < 1 || num_threads > static_cast<std::int64_t>(kMaxThreads))
        throw std::invalid_argument(message("num_threads=", num_threads, " must be in [1, ", kMaxThreads, "]"));
    return static_cast<std::size_t>(num_threads);
}

}  // namespace

// Throws when a prompt of the batch was last updated after `step`.
void Ledger::check_order(Span<const std::uint64_t> prompt_ids, std::int64_t step) const {
    if (step >= newest_step_) return;
    table_.find_each(prompt_ids, [&](std::size_t, const Record* record) {
        if (record != nullptr && record->last_step > step)
            throw std::invalid_argument(message("update: prompt ", record->prompt_id(), " was last updated at step ",
                                                record->last_step, "; step=", step,
                                                " would go back; pass a step >= ", record->last_step));
    });
}

// Throws when a prompt's lifetime totals would leave their range. `most_` bounds every record's totals from above, and
// the whole batch on top of it is a bound that almost every batch keeps; only where it fails the table is asked.
void Ledger::reserve_totals(const LedgerTotals& added, const std::function<void()>& check_exactly) {
    if (!most_.has_room_for(added)) {
        most_ = {};
        table_.for_each([this](const Record& record) { most_.raise(record); });
        if (!most_.has_room_for(added)) check_exactly();
    }
    most_.attempts = std::min<std::uint64_t>(kCountMax, most_.attempts + added.attempts);
    most_.tokens = std::min<std::uint64_t>(kCountMax, most_.tokens + added.tokens);
    most_.nats = std::min(kEntropyMax * kEntropyUnit, most_.nats + added.nats);
}

void Ledger::update(const LedgerBatch& batch, std::int64_t step, std::int64_t num_threads) {
    check_step(step);
    const std::size_t threads = checked_threads(num_threads);
    const LedgerTotals totals = checked_totals(batch);
    const std::unique_lock<std::shared_mutex> lock(mutex_);
    check_order(batch.prompt_ids, step);
    reserve_totals(totals, [&] {
        std::vector<Record> added(batch.prompt_ids.size);
        for (std::size_t i = 0; i < added.size(); ++i) {
            const Aggregates::Entry entry = Aggregates{batch}.entry(i);
            added[i] = Record{entry.key,
                              0.0,
                              0.0,
                              entry.added.entropy_sum,
                              entry.added.token_count,
                              entry.added.attempts,
                              entry.added.successes,
                              0};
        }
        check_capacity(std::move(added));
    });
    apply_all(table_, Aggregates{batch}, step, threads, decay_);
    if (batch.prompt_ids.size > 0) newest_step_ = std::max(newest_step_, step);
}

void Ledger::update(const VerdictBatch& batch, std::int64_t step, std::int64_t num_threads) {
    check_step(step);
    const std::size_t threads = checked_threads(num_threads);
    if (batch.solved.size != batch.prompt_ids.size)
        throw std::invalid_argument(message("update_verdicts: prompt_ids has ", batch.prompt_ids.size,
                                            " entries and solved ", batch.solved.size, "; they must be equal"));
    const std::unique_lock<std::shared_mutex> lock(mutex_);
    check_order(batch.prompt_ids, step);
    reserve_totals({batch.prompt_ids.size, 0, 0.0}, [&] {
        std::vector<Record> added(batch.prompt_ids.size);
        for (std::size_t i = 0; i < added.size(); ++i)
            added[i] = Record{splitmix64(batch.prompt_ids[i]), 0.0, 0.0, 0, 0, 1, 0, 0};
        check_capacity(std::move(added));
    });
    apply_all(table_, Verdicts{batch}, step, threads, decay_);
    if (batch.prompt_ids.size > 0) newest_step_ = std::max(newest_step_, step);
}

}  // namespace aer

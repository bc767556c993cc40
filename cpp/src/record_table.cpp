#include "aer/record_table.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace aer {

std::size_t RecordTable::num_buckets_at(int level, std::size_t shard) {
    if (level < 0) return 0;
    return static_cast<std::size_t>(std::ceil(std::exp2(level + static_cast<double>(shard) / kShards)));
}

RecordTable::RecordTable(std::size_t capacity_hint) {
    chunks_.reserve(capacity_hint / kChunk + 1);
    if (capacity_hint < kShards * kBucketSlots) return;
    // Hashing spreads prompts over shards binomially: four standard deviations of room, and no shard grows again.
    const double expected = static_cast<double>(capacity_hint) / kShards;
    const double wanted = expected + 4.0 * std::sqrt(expected);
    for (std::size_t shard = 0; shard < kShards; ++shard) {
        int level = 0;
        while (static_cast<double>(max_size(num_buckets_at(level, shard))) < wanted) ++level;
        resize(shard, level);
    }
}

std::size_t RecordTable::nbytes() const {
    std::size_t bytes = sizeof *this + chunks_.capacity() * sizeof chunks_[0] + chunks_.size() * kChunk * sizeof(Record);
    for (const Shard& shard : shards_) bytes += shard.buckets.capacity() * sizeof(Bucket);
    return bytes;
}

std::uint32_t RecordTable::find_hashed(std::uint64_t prompt_id, std::uint64_t hash) const {
    const std::vector<Bucket>& buckets = shards_[shard_of(hash)].buckets;
    if (buckets.empty()) return kAbsent;
    const std::uint8_t tag = tag_of(hash);
    for (std::size_t b = home(hash, buckets.size());; b = b + 1 == buckets.size() ? 0 : b + 1) {
        const Bucket& bucket = buckets[b];
        for (std::uint32_t slot = 0; slot < bucket.count; ++slot)
            if (bucket.tags[slot] == tag && at(bucket.positions[slot]).prompt_id == prompt_id)
                return bucket.positions[slot];
        if (bucket.count < kBucketSlots) return kAbsent;
    }
}

std::uint32_t RecordTable::find(std::uint64_t prompt_id) const { return find_hashed(prompt_id, splitmix64(prompt_id)); }

void RecordTable::place(std::vector<Bucket>& buckets, std::uint64_t hash, std::uint32_t position) {
    std::size_t b = home(hash, buckets.size());
    while (buckets[b].count == kBucketSlots) b = b + 1 == buckets.size() ? 0 : b + 1;
    Bucket& bucket = buckets[b];
    bucket.tags[bucket.count] = tag_of(hash);
    bucket.positions[bucket.count] = position;
    ++bucket.count;
}

void RecordTable::resize(std::size_t shard_index, int level) {
    Shard& shard = shards_[shard_index];
    std::vector<Bucket> grown(num_buckets_at(level, shard_index));
    for (std::size_t b = 0; b < shard.buckets.size(); ++b) {
        if (b + 2 < shard.buckets.size())
            for (std::uint32_t slot = 0; slot < shard.buckets[b + 2].count; ++slot)
                prefetch(shard.buckets[b + 2].positions[slot]);
        const Bucket& bucket = shard.buckets[b];
        for (std::uint32_t slot = 0; slot < bucket.count; ++slot)
            place(grown, splitmix64(at(bucket.positions[slot]).prompt_id), bucket.positions[slot]);
    }
    shard.buckets = std::move(grown);
    shard.level = level;
}

std::uint32_t RecordTable::insert(std::uint64_t prompt_id, std::uint64_t hash) {
    if (size_ >= kAbsent) throw std::length_error("a difficulty ledger holds at most 2^32 - 1 prompts");
    if (size_ == chunks_.size() * kChunk) chunks_.emplace_back(new Record[kChunk]);
    const std::size_t shard_index = shard_of(hash);
    Shard& shard = shards_[shard_index];
    if (shard.size + 1 > max_size(shard.buckets.size())) resize(shard_index, shard.level + 1);
    const auto position = static_cast<std::uint32_t>(size_);
    place(shard.buckets, hash, position);
    at(position) = Record{prompt_id, 0.0, 0.0, 0, 0, 0, 0, -1};
    ++shard.size;
    ++size_;
    return position;
}

Record& RecordTable::find_or_insert(std::uint64_t prompt_id) {
    const std::uint64_t hash = splitmix64(prompt_id);
    const std::uint32_t position = find_hashed(prompt_id, hash);
    return at(position == kAbsent ? insert(prompt_id, hash) : position);
}

void RecordTable::append(Span<const Record> records) {
    constexpr std::size_t kAhead = 32;
    for (std::size_t i = 0; i < records.size; ++i) {
        if (i + kAhead < records.size) {
            const std::uint64_t hash = splitmix64(records[i + kAhead].prompt_id);
            const std::vector<Bucket>& buckets = shards_[shard_of(hash)].buckets;
            __builtin_prefetch(buckets.data() + home(hash, buckets.size()), 1);
        }
        at(insert(records[i].prompt_id, splitmix64(records[i].prompt_id))) = records[i];
    }
}

std::vector<std::uint32_t> RecordTable::sorted_positions() const {
    struct Entry {
        std::uint64_t key;
        std::uint32_t position;
    };
    std::vector<Entry> entries(size_);
    bool sorted = true;
    for (std::uint32_t i = 0; i < size_; ++i) {
        entries[i] = Entry{at(i).prompt_id, i};
        sorted = sorted && (i == 0 || entries[i - 1].key <= entries[i].key);
    }
    if (!sorted && size_ < 4096) {
        std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) { return a.key < b.key; });
    } else if (!sorted) {  // least-significant-digit radix sort; constant digits (small ids) cost nothing
        constexpr int kBits = 11;
        std::vector<Entry> other(size_);
        for (int shift = 0; shift < 64; shift += kBits) {
            std::vector<std::size_t> start((1U << kBits) + 1, 0);
            const auto digit = [shift](const Entry& e) { return (e.key >> shift) & ((1U << kBits) - 1); };
            for (const Entry& e : entries) ++start[digit(e) + 1];
            if (start[digit(entries[0]) + 1] == size_) continue;
            for (std::size_t d = 1; d < start.size(); ++d) start[d] += start[d - 1];
            for (const Entry& e : entries) other[start[digit(e)]++] = e;
            entries.swap(other);
        }
    }
    std::vector<std::uint32_t> positions(size_);
    std::transform(entries.begin(), entries.end(), positions.begin(), [](const Entry& e) { return e.position; });
    return positions;
}

}  // namespace aer

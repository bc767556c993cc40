#include "aer/record_table.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace aer {

std::size_t RecordShard::num_buckets_at(int level) const {
    if (level < 0) return 0;
    return static_cast<std::size_t>(std::ceil(std::exp2(level + static_cast<double>(number_) / RecordTable::kShards)));
}

std::size_t RecordShard::nbytes() const {
    std::size_t bytes = buckets_.capacity() * sizeof(Bucket) + chunks_.capacity() * sizeof chunks_[0];
    for (std::size_t chunk = 0; chunk < chunks_.size(); ++chunk) bytes += chunk_size(chunk) * sizeof(Record);
    return bytes;
}

Record* RecordShard::find(std::uint64_t key) const {
    if (buckets_.empty()) return nullptr;
    for (std::size_t b = home(key, buckets_.size());; b = b + 1 == buckets_.size() ? 0 : b + 1) {
        const Bucket& bucket = buckets_[b];
        for (std::uint32_t found = bucket.matches(tag_of(key)); found != 0; found &= found - 1) {
            Record& record = at(bucket.places[__builtin_ctz(found)]);
            if (record.key == key) return &record;
        }
        if (bucket.count < kBucketSlots) return nullptr;
    }
}

Record& RecordShard::find_or_insert(std::uint64_t key) {
    Record* const record = find(key);
    return record != nullptr ? *record : insert(key);
}

Record& RecordShard::insert(std::uint64_t key) {
    if (room_ == 0) {
        const std::size_t size = chunk_size(chunks_.size());
        if (size > std::size_t{1} << kOffsetBits)
            throw std::length_error("a difficulty ledger holds at most 2^35 prompts");
        if (chunks_.size() == chunks_.capacity()) chunks_.reserve(chunks_.size() + 16);
        chunks_.emplace_back(new Record[size]);
        room_ = size;
    }
    if (size_ + 1 > max_size(buckets_.size())) resize(level_ + 1);
    const std::size_t last = chunks_.size() - 1;
    const std::size_t offset = chunk_size(last) - room_;
    put(buckets_, key, static_cast<std::uint32_t>(last << kOffsetBits | offset));
    --room_;
    ++size_;
    return chunks_[last][offset] = Record{key, 0.0, 0.0, 0, 0, 0, 0, -1};
}

void RecordShard::put(std::vector<Bucket>& buckets, std::uint64_t key, std::uint32_t place) {
    std::size_t b = home(key, buckets.size());
    while (buckets[b].count == kBucketSlots) b = b + 1 == buckets.size() ? 0 : b + 1;
    Bucket& bucket = buckets[b];
    bucket.tags[bucket.count] = tag_of(key);
    bucket.places[bucket.count] = place;
    ++bucket.count;
}

void RecordShard::resize(int level) {
    std::vector<Bucket> grown(num_buckets_at(level));
    for (std::size_t b = 0; b < buckets_.size(); ++b) {
        if (b + 2 < buckets_.size())
            for (std::uint32_t slot = 0; slot < buckets_[b + 2].count; ++slot)
                __builtin_prefetch(&at(buckets_[b + 2].places[slot]));
        for (std::uint32_t slot = 0; slot < buckets_[b].count; ++slot)
            put(grown, at(buckets_[b].places[slot]).key, buckets_[b].places[slot]);
    }
    buckets_ = std::move(grown);
    level_ = level;
}

void RecordShard::reserve(double expected) {
    int level = 0;
    while (static_cast<double>(max_size(num_buckets_at(level))) < expected) ++level;
    resize(level);
}

RecordTable::RecordTable(std::size_t capacity_hint) {
    for (std::size_t number = 0; number < kShards; ++number) shards_[number].number_ = number;
    if (capacity_hint < kShards * 12) return;
    // Hashing spreads prompts over shards binomially: four standard deviations of room, and no shard grows again.
    const double expected = static_cast<double>(capacity_hint) / kShards;
    for (RecordShard& shard : shards_) shard.reserve(expected + 4.0 * std::sqrt(expected));
}

std::size_t RecordTable::size() const {
    std::size_t total = 0;
    for (const RecordShard& shard : shards_) total += shard.size();
    return total;
}

std::size_t RecordTable::nbytes() const {
    std::size_t bytes = sizeof *this;
    for (const RecordShard& shard : shards_) bytes += shard.nbytes();
    return bytes;
}

std::vector<const Record*> RecordTable::by_key(std::size_t shard_number) const {
    const RecordShard& shard = shards_[shard_number];
    std::vector<const Record*> records(shard.size());
    // One counting pass over as many of the key's bits as there are records, then few neighbours are out of order.
    int bits = 1;
    while ((std::size_t{1} << bits) < shard.size()) ++bits;
    const auto digit = [bits](std::uint64_t key) { return (key << 8) >> (64 - bits); };
    std::vector<std::uint32_t> start((std::size_t{1} << bits) + 1, 0);
    shard.for_each([&](const Record& record) { ++start[digit(record.key) + 1]; });
    for (std::size_t d = 1; d < start.size(); ++d) start[d] += start[d - 1];
    shard.for_each([&](const Record& record) { records[start[digit(record.key)]++] = &record; });
    for (std::size_t i = 1; i < records.size(); ++i) {
        const Record* const record = records[i];
        std::size_t hole = i;
        for (; hole > 0 && records[hole - 1]->key > record->key; --hole) records[hole] = records[hole - 1];
        records[hole] = record;
    }
    return records;
}

std::vector<const Record*> RecordTable::by_prompt_id() const {
    struct Entry {
        std::uint64_t id;
        const Record* record;
    };
    std::vector<Entry> entries;
    entries.reserve(size());
    for_each([&](const Record& record) { entries.push_back({record.prompt_id(), &record}); });
    if (entries.size() < 4096) {
        std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) { return a.id < b.id; });
    } else {  // least-significant-digit radix sort; constant digits (small ids) cost nothing
        constexpr int kBits = 11;
        std::vector<Entry> other(entries.size());
        for (int shift = 0; shift < 64; shift += kBits) {
            std::vector<std::size_t> start((1U << kBits) + 1, 0);
            const auto digit = [shift](const Entry& e) { return (e.id >> shift) & ((1U << kBits) - 1); };
            for (const Entry& e : entries) ++start[digit(e) + 1];
            if (start[digit(entries[0]) + 1] == entries.size()) continue;
            for (std::size_t d = 1; d < start.size(); ++d) start[d] += start[d - 1];
            for (const Entry& e : entries) other[start[digit(e)]++] = e;
            entries.swap(other);
        }
    }
    std::vector<const Record*> records(entries.size());
    std::transform(entries.begin(), entries.end(), records.begin(), [](const Entry& e) { return e.record; });
    return records;
}

}  // namespace aer

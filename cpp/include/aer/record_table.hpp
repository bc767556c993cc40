// Records in insertion order and an open-addressing index over their prompt ids.
//
// Growth never stops the world: records lie in fixed chunks that never move, and the index is cut into 256 shards whose
// sizes are staggered by 2^(1/256), so that they double one after another. One insertion moves at most one shard's
// index entries (1/256 of the prompts), and index bytes per prompt stay between 6.3 and 12.6.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "aer/hashing.hpp"
#include "aer/record.hpp"
#include "aer/span.hpp"

namespace aer {

class RecordTable {
  public:
    static constexpr std::uint32_t kAbsent = UINT32_MAX;

    explicit RecordTable(std::size_t capacity_hint);

    std::size_t size() const { return size_; }
    std::size_t nbytes() const;
    Record& at(std::uint32_t i) { return chunks_[i / kChunk][i % kChunk]; }
    const Record& at(std::uint32_t i) const { return chunks_[i / kChunk][i % kChunk]; }

    // The position of the prompt's record, or kAbsent.
    std::uint32_t find(std::uint64_t prompt_id) const;
    // visitor(i, position or kAbsent) for many prompts, in order: memory latencies overlap.
    template <class Visitor>
    void find_each(Span<const std::uint64_t> prompt_ids, Visitor&& visitor) const;
    // The record of the prompt, a new zero record where there was none (`last_step` -1).
    Record& find_or_insert(std::uint64_t prompt_id);
    // Appends records of prompts that are not in the table.
    void append(Span<const Record> records);
    // Positions sorted by prompt id.
    std::vector<std::uint32_t> sorted_positions() const;

    void prefetch(std::uint32_t i) const { __builtin_prefetch(&at(i)); }

  private:
    static constexpr std::size_t kChunk = 4096;
    static constexpr std::size_t kShards = 256;
    static constexpr std::uint32_t kBucketSlots = 12;

    // One cache line: a lookup reads one byte of hash per candidate before it touches a record.
    struct alignas(64) Bucket {
        std::uint8_t tags[kBucketSlots];
        std::uint32_t count;
        std::uint32_t positions[kBucketSlots];
    };
    static_assert(sizeof(Bucket) == 64);

    struct Shard {
        std::vector<Bucket> buckets;
        std::size_t size = 0;
        int level = -1;  // buckets.size() == ceil(2^(level + shard / 256))
    };

    static std::size_t shard_of(std::uint64_t hash) { return hash >> 56; }
    static std::uint8_t tag_of(std::uint64_t hash) { return static_cast<std::uint8_t>(hash >> 32); }
    static std::size_t home(std::uint64_t hash, std::size_t num_buckets) {
        return (static_cast<std::uint64_t>(static_cast<std::uint32_t>(hash)) * num_buckets) >> 32;
    }
    static std::size_t num_buckets_at(int level, std::size_t shard);
    static std::size_t max_size(std::size_t num_buckets) { return num_buckets * kBucketSlots * 17 / 20; }

    const Bucket* home_bucket(std::uint64_t hash) const {
        const std::vector<Bucket>& buckets = shards_[shard_of(hash)].buckets;
        return buckets.empty() ? nullptr : &buckets[home(hash, buckets.size())];
    }
    std::uint32_t find_hashed(std::uint64_t prompt_id, std::uint64_t hash) const;
    std::uint32_t insert(std::uint64_t prompt_id, std::uint64_t hash);
    static void place(std::vector<Bucket>& buckets, std::uint64_t hash, std::uint32_t position);
    void resize(std::size_t shard_index, int level);

    std::array<Shard, kShards> shards_;
    std::vector<std::unique_ptr<Record[]>> chunks_;
    std::size_t size_ = 0;
};

template <class Visitor>
void RecordTable::find_each(Span<const std::uint64_t> prompt_ids, Visitor&& visitor) const {
    constexpr std::size_t kBlock = 64;
    std::array<std::uint64_t, kBlock> hashes;
    for (std::size_t start = 0; start < prompt_ids.size; start += kBlock) {
        const std::size_t n = std::min(kBlock, prompt_ids.size - start);
        for (std::size_t i = 0; i < n; ++i) {
            hashes[i] = splitmix64(prompt_ids[start + i]);
            if (const Bucket* bucket = home_bucket(hashes[i])) __builtin_prefetch(bucket);
        }
        for (std::size_t i = 0; i < n; ++i)
            if (const Bucket* bucket = home_bucket(hashes[i]))
                for (std::uint32_t slot = 0; slot < bucket->count; ++slot)
                    if (bucket->tags[slot] == tag_of(hashes[i])) prefetch(bucket->positions[slot]);
        for (std::size_t i = 0; i < n; ++i) visitor(start + i, find_hashed(prompt_ids[start + i], hashes[i]));
    }
}

}  // namespace aer

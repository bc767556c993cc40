// Records found by the mixed prompt id (their key), in 256 shards of their own: the key's highest byte names the shard.
//
// A shard is small enough for a core's cache, and two shards share nothing, so that a large batch is applied shard by
// shard, on several threads without locks. Growth never stops the world: a shard's records lie in chunks that never
// move (each at most 1/16 of what came before it), and the shards' indices have sizes staggered by 2^(1/256), so that
// they double one after another: one insertion moves at most one shard's index entries, 1/256 of the prompts.
// Index bytes per prompt stay between 6.3 and 12.6, over all shards about 9.
#pragma once

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

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

class RecordShard {
  public:
    std::size_t size() const { return size_; }
    std::size_t nbytes() const;  // of what it points at
    Record* find(std::uint64_t key) const;
    // A new zero record with `last_step` -1 where there was none.
    Record& find_or_insert(std::uint64_t key);
    // The caller knows that the key is new.
    Record& insert(std::uint64_t key);

    // Two steps of a lookup ahead of time, so that the latencies of many lookups overlap.
    void prefetch_bucket(std::uint64_t key) const {
        if (!buckets_.empty()) __builtin_prefetch(&buckets_[home(key, buckets_.size())]);
    }
    // Brings everything the shard holds into the core's cache in the order of memory, which hardware does at several
    // times the speed of scattered lines. It reads, because a compiler may drop a function that only prefetches.
    void touch_all() const;
    // The record that the key probably has (nullptr: probably none), prefetched; compare its key before use.
    Record* probable(std::uint64_t key) const;

    template <class Visitor>
    void for_each(Visitor&& visitor) const {
        std::size_t left = size_;
        for (std::size_t chunk = 0; left > 0; ++chunk) {
            const std::size_t n = std::min(left, chunk_size(chunk));
            for (std::size_t i = 0; i < n; ++i) visitor(static_cast<const Record&>(chunks_[chunk][i]));
            left -= n;
        }
    }

  private:
    friend class RecordTable;

    static constexpr std::uint32_t kBucketSlots = 12;
    static constexpr int kOffsetBits = 23;

    // One cache line: a lookup compares one byte of the key per candidate before it touches a record.
    struct alignas(64) Bucket {
        std::uint8_t tags[kBucketSlots];
        std::uint32_t count;
        std::uint32_t places[kBucketSlots];  // chunk number << kOffsetBits | offset in the chunk

        std::uint32_t matches(std::uint8_t tag) const;  // bit i: slot i is in use and has this tag
    };
    static_assert(sizeof(Bucket) == 64);

    // The first 16 chunks hold 8 records each, the next 16 chunks 16 each, and so on: a new chunk is at most 1/16 of
    // all.
    static std::size_t chunk_size(std::size_t chunk) { return std::size_t{8} << (chunk / 16); }
    Record& at(std::uint32_t place) const { return chunks_[place >> kOffsetBits][place & ((1U << kOffsetBits) - 1)]; }
    static std::uint8_t tag_of(std::uint64_t key) { return static_cast<std::uint8_t>(key); }
    // Ascends with the key, so that a file, whose records are sorted by key, fills buckets from first to last.
    static std::size_t home(std::uint64_t key, std::size_t num_buckets) {
        return (static_cast<std::uint64_t>(static_cast<std::uint32_t>(key >> 24)) * num_buckets) >> 32;
    }
    static std::size_t max_size(std::size_t num_buckets) { return num_buckets * kBucketSlots * 17 / 20; }
    std::size_t num_buckets_at(int level) const;
    static void put(std::vector<Bucket>& buckets, std::uint64_t key, std::uint32_t place);
    void resize(int level);
    void reserve(double expected);

    std::vector<Bucket> buckets_;
    std::vector<std::unique_ptr<Record[]>> chunks_;
    std::size_t size_ = 0;
    std::size_t room_ = 0;    // records that the last chunk can still take
    std::size_t number_ = 0;  // of the shard
    int level_ = -1;          // buckets_.size() == ceil(2^(level + number / 256))
};

class RecordTable {
  public:
    static constexpr std::size_t kShards = 256;

    explicit RecordTable(std::size_t capacity_hint);

    std::size_t size() const;
    std::size_t nbytes() const;
    static std::size_t shard_of(std::uint64_t key) { return key >> 56; }
    RecordShard& shard(std::size_t number) { return shards_[number]; }
    const RecordShard& shard(std::size_t number) const { return shards_[number]; }

    Record* find(std::uint64_t key) const { return shards_[shard_of(key)].find(key); }
    Record& find_or_insert(std::uint64_t key) { return shards_[shard_of(key)].find_or_insert(key); }
    // visitor(i, record or nullptr) for many prompts, in order.
    template <class Visitor>
    void find_each(Span<const std::uint64_t> prompt_ids, Visitor&& visitor) const;
    template <class Visitor>
    void for_each(Visitor&& visitor) const;
    // Sorted by prompt id.
    std::vector<const Record*> by_prompt_id() const;
    // One shard's records sorted by key: over all shards in turn, the whole table's.
    std::vector<const Record*> by_key(std::size_t shard_number) const;

  private:
    std::array<RecordShard, kShards> shards_;
};

inline std::uint32_t RecordShard::Bucket::matches(std::uint8_t tag) const {
#if defined(__SSE2__)  // every x86-64
    const __m128i line = _mm_load_si128(reinterpret_cast<const __m128i*>(this));
    const auto found =
        static_cast<std::uint32_t>(_mm_movemask_epi8(_mm_cmpeq_epi8(line, _mm_set1_epi8(static_cast<char>(tag)))));
#else
    std::uint32_t found = 0;
    for (std::uint32_t slot = 0; slot < kBucketSlots; ++slot) found |= std::uint32_t{tags[slot] == tag} << slot;
#endif
    return found & ((1U << count) - 1);
}

inline Record* RecordShard::probable(std::uint64_t key) const {
    if (buckets_.empty()) return nullptr;
    const Bucket& bucket = buckets_[home(key, buckets_.size())];
    const std::uint32_t found = bucket.matches(tag_of(key));
    if (found == 0) return nullptr;
    Record* const record = &at(bucket.places[__builtin_ctz(found)]);
    __builtin_prefetch(record, 1);
    __builtin_prefetch(reinterpret_cast<const char*>(record) + sizeof(Record) - 1, 1);  // it may cross a line
    return record;
}

inline void RecordShard::touch_all() const {
    const auto touch = [](const void* first, std::size_t bytes) {
        const auto* const line = static_cast<const volatile unsigned char*>(first);
        for (std::size_t at = 0; at < bytes; at += 64) static_cast<void>(line[at]);
    };
    touch(buckets_.data(), buckets_.size() * sizeof(Bucket));
    std::size_t left = size_;
    for (std::size_t chunk = 0; left > 0; ++chunk) {
        const std::size_t n = std::min(left, chunk_size(chunk));
        touch(chunks_[chunk].get(), n * sizeof(Record));
        left -= n;
    }
}

template <class Visitor>
void RecordTable::find_each(Span<const std::uint64_t> prompt_ids, Visitor&& visitor) const {
    constexpr std::size_t kBlock = 64;
    std::array<std::uint64_t, kBlock> keys;
    std::array<Record*, kBlock> records;
    for (std::size_t start = 0; start < prompt_ids.size; start += kBlock) {
        const std::size_t n = std::min(kBlock, prompt_ids.size - start);
        for (std::size_t i = 0; i < n; ++i) {
            keys[i] = splitmix64(prompt_ids[start + i]);
            shards_[shard_of(keys[i])].prefetch_bucket(keys[i]);
        }
        for (std::size_t i = 0; i < n; ++i) records[i] = shards_[shard_of(keys[i])].probable(keys[i]);
        for (std::size_t i = 0; i < n; ++i) {
            if (records[i] == nullptr || records[i]->key != keys[i]) records[i] = find(keys[i]);
            visitor(start + i, records[i]);
        }
    }
}

template <class Visitor>
void RecordTable::for_each(Visitor&& visitor) const {
    for (const RecordShard& shard : shards_) shard.for_each(visitor);
}

}  // namespace aer

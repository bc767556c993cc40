// Records found by the mixed prompt id (their key): one array by open addressing, always sorted by key.
//
// A key's home is its share of the array (key / 2^64), so that homes ascend with keys; a record lies at its home or,
// where larger keys would come before it, in the free place behind them (ordered hash tables, Amble and Knuth 1974).
// A lookup is one place of memory, a file's records are the array without its gaps, and growth is one pass in order.
// Between 56 and 64 bytes per prompt, except in small tables and while it grows.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "aer/hashing.hpp"
#include "aer/record.hpp"
#include "aer/span.hpp"

namespace aer {

class RecordTable {
  public:
    // Throws std::length_error for more prompts than the table can hold.
    explicit RecordTable(std::size_t capacity_hint);

    std::size_t size() const { return size_; }
    std::size_t nbytes() const { return sizeof *this + slots_.capacity() * sizeof(Record); }

    const Record* find(std::uint64_t key) const {
        const Record& record = slots_[place_of(key)];
        return holds(record) && record.key == key ? &record : nullptr;
    }
    Record& writable(const Record* found) { return slots_[static_cast<std::size_t>(found - slots_.data())]; }
    // Where there was none: a new record of `step` with zeros. The reference is valid until the next insertion.
    Record& find_or_insert(std::uint64_t key, std::int64_t step);
    // The caller knows that every key in the table is smaller.
    void append(const Record& record);
    // Room for so many prompts without growth.
    void reserve(std::size_t num_prompts);

    // visitor(i, record or nullptr) for many prompts, in order; the latencies of their lookups overlap.
    template <class Visitor>
    void find_each(Span<const std::uint64_t> prompt_ids, Visitor&& visitor) const;
    // In the order of keys.
    template <class Visitor>
    void for_each(Visitor&& visitor) const {
        for (const Record& record : slots_)
            if (holds(record)) visitor(record);
    }

  private:
    // The key of a free slot ends every search for a smaller one.
    static constexpr Record kFree{UINT64_MAX, 0.0, 0.0, 0, 0, 0, 0, -1};
    static bool holds(const Record& record) { return record.last_step >= 0; }

    std::size_t home(std::uint64_t key) const { return ((key >> 32) * num_homes_) >> 32; }
    // Where the key is or belongs: the first slot from its home on that is free or holds no smaller key.
    std::size_t place_of(std::uint64_t key) const {
        std::size_t place = home(key);
        while (slots_[place].key < key) ++place;
        return place;
    }
    void prefetch(std::uint64_t key) const {
        const auto* const line = reinterpret_cast<const char*>(&slots_[home(key)]);
        for (std::size_t i = 0; i < 3; ++i) __builtin_prefetch(line + 64 * i);
    }

    std::size_t num_homes_;
    std::size_t most_;  // prompts before it grows
    std::size_t size_ = 0;
    std::size_t end_ = 0;        // behind the last record
    std::vector<Record> slots_;  // the last one is always free
};

template <class Visitor>
void RecordTable::find_each(Span<const std::uint64_t> prompt_ids, Visitor&& visitor) const {
    constexpr std::size_t kAhead = 16;
    for (std::size_t i = 0; i < std::min(kAhead, prompt_ids.size); ++i) prefetch(splitmix64(prompt_ids[i]));
    for (std::size_t i = 0; i < prompt_ids.size; ++i) {
        if (i + kAhead < prompt_ids.size) prefetch(splitmix64(prompt_ids[i + kAhead]));
        visitor(i, find(splitmix64(prompt_ids[i])));
    }
}

}  // namespace aer

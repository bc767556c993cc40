#include "aer/record_table.hpp"

#include <stdexcept>
#include <utility>

namespace aer {
namespace {

// Slots behind the last home, for what its neighbourhood pushes there; a vector grows where they do not suffice.
constexpr std::size_t kTail = 64;

}  // namespace

RecordTable::RecordTable(std::size_t capacity_hint)
    : num_homes_((capacity_hint / 17 + 1) * 20), most_(num_homes_ / 20 * 17) {
    if (num_homes_ > std::size_t{1} << 32) throw std::length_error("a difficulty ledger holds at most 3.6e9 prompts");
    slots_.assign(num_homes_ + kTail, kFree);
}

Record& RecordTable::find_or_insert(std::uint64_t key, std::int64_t step) {
    std::size_t place = place_of(key);
    if (holds(slots_[place]) && slots_[place].key == key) return slots_[place];
    if (size_ == most_) {
        reserve(size_ + size_ / 8 + 1);
        place = place_of(key);
    }
    // larger keys move up by one, into the next free slot
    std::size_t free = place;
    while (holds(slots_[free])) ++free;
    if (free + 1 == slots_.size()) slots_.push_back(kFree);
    std::move_backward(slots_.begin() + static_cast<std::ptrdiff_t>(place),
                       slots_.begin() + static_cast<std::ptrdiff_t>(free),
                       slots_.begin() + static_cast<std::ptrdiff_t>(free) + 1);
    end_ = std::max(end_, free + 1);
    ++size_;
    return slots_[place] = Record{key, 0.0, 0.0, 0, 0, 0, 0, static_cast<std::int32_t>(step)};
}

void RecordTable::append(const Record& record) {
    if (size_ == most_) reserve(size_ + size_ / 8 + 1);
    const std::size_t place = std::max(home(record.key), end_);
    if (place + 1 >= slots_.size()) slots_.resize(place + 2, kFree);
    slots_[place] = record;
    end_ = place + 1;
    ++size_;
}

void RecordTable::reserve(std::size_t num_prompts) {
    if (num_prompts <= most_) return;
    RecordTable grown(num_prompts);
    for_each([&grown](const Record& record) { grown.append(record); });
    *this = std::move(grown);
}

}  // namespace aer

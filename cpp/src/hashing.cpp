#include "aer/hashing.hpp"

#include <algorithm>
#include <cstring>

namespace aer {
namespace {

std::uint64_t rotate_left(std::uint64_t x, int bits) { return (x << bits) | (x >> (64 - bits)); }

template <class Word>
Word read(const unsigned char* bytes) {
    Word word;
    std::memcpy(&word, bytes, sizeof word);
    return word;
}

}  // namespace

std::uint64_t Checksum64::round(std::uint64_t lane, std::uint64_t word) {
    return rotate_left(lane + word * kPrime2, 31) * kPrime1;
}

void Checksum64::stripe(const unsigned char* bytes) {
    for (std::size_t i = 0; i < 4; ++i) lanes_[i] = round(lanes_[i], read<std::uint64_t>(bytes + 8 * i));
}

void Checksum64::update(const void* data, std::size_t size) {
    if (size == 0) return;
    const auto* bytes = static_cast<const unsigned char*>(data);
    total_ += size;
    if (num_pending_ > 0) {
        const std::size_t taken = std::min(size, sizeof pending_ - num_pending_);
        std::memcpy(pending_ + num_pending_, bytes, taken);
        num_pending_ += taken;
        bytes += taken;
        size -= taken;
        if (num_pending_ < sizeof pending_) return;
        stripe(pending_);
        num_pending_ = 0;
    }
    for (; size >= sizeof pending_; bytes += sizeof pending_, size -= sizeof pending_) stripe(bytes);
    if (size > 0) std::memcpy(pending_, bytes, size);
    num_pending_ = size;
}

std::uint64_t Checksum64::digest() const {
    std::uint64_t hash = kPrime5;
    if (total_ >= sizeof pending_) {
        hash = rotate_left(lanes_[0], 1) + rotate_left(lanes_[1], 7) + rotate_left(lanes_[2], 12) +
               rotate_left(lanes_[3], 18);
        for (const std::uint64_t lane : lanes_) hash = (hash ^ round(0, lane)) * kPrime1 + kPrime4;
    }
    hash += total_;
    const unsigned char* bytes = pending_;
    std::size_t left = num_pending_;
    for (; left >= 8; bytes += 8, left -= 8)
        hash = rotate_left(hash ^ round(0, read<std::uint64_t>(bytes)), 27) * kPrime1 + kPrime4;
    if (left >= 4) {
        hash = rotate_left(hash ^ (read<std::uint32_t>(bytes) * kPrime1), 23) * kPrime2 + kPrime3;
        bytes += 4;
        left -= 4;
    }
    for (; left > 0; ++bytes, --left) hash = rotate_left(hash ^ (*bytes * kPrime5), 11) * kPrime1;
    hash = (hash ^ (hash >> 33)) * kPrime2;
    hash = (hash ^ (hash >> 29)) * kPrime3;
    return hash ^ (hash >> 32);
}

}  // namespace aer

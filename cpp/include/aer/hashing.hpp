// The two hashes of the project: splitmix64's finaliser (hash tables) and XXH64 (file checksums).
#pragma once

#include <cstddef>
#include <cstdint>

namespace aer {

// Bijective mixing of 64 bits (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"):
// prompt ids may be consecutive numbers, and a table needs all of its bits to depend on all of theirs.
inline std::uint64_t splitmix64(std::uint64_t x) {
    x += 0x9E3779B97F4A7C15ULL;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ULL;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBULL;
    return x ^ (x >> 31);
}

// The x of splitmix64(x): each of its steps undone in reverse, with the multipliers' inverses modulo 2^64.
inline std::uint64_t splitmix64_inverse(std::uint64_t x) {
    x = (x ^ (x >> 31) ^ (x >> 62)) * 0x319642B2D24D8EC3ULL;
    x = (x ^ (x >> 27) ^ (x >> 54)) * 0x96DE1B173F119089ULL;
    return (x ^ (x >> 30) ^ (x >> 60)) - 0x9E3779B97F4A7C15ULL;
}

// XXH64 with seed 0, fed in pieces of any length (specification: xxHash, doc/xxhash_spec.md).
class Checksum64 {
  public:
    void update(const void* bytes, std::size_t size);
    std::uint64_t digest() const;

  private:
    static constexpr std::uint64_t kPrime1 = 0x9E3779B185EBCA87ULL;
    static constexpr std::uint64_t kPrime2 = 0xC2B2AE3D27D4EB4FULL;
    static constexpr std::uint64_t kPrime3 = 0x165667B19E3779F9ULL;
    static constexpr std::uint64_t kPrime4 = 0x85EBCA77C2B2AE63ULL;
    static constexpr std::uint64_t kPrime5 = 0x27D4EB2F165667C5ULL;

    static std::uint64_t round(std::uint64_t lane, std::uint64_t word);
    void stripe(const unsigned char* bytes);

    std::uint64_t lanes_[4] = {kPrime1 + kPrime2, kPrime2, 0, 0 - kPrime1};
    unsigned char pending_[32] = {};
    std::size_t num_pending_ = 0;
    std::uint64_t total_ = 0;
};

}  // namespace aer

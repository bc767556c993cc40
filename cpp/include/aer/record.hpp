// One prompt's history: what the ledger keeps in memory and, byte for byte, in its file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "aer/hashing.hpp"

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the ledger file is little-endian and records are written as they lie in memory"
#endif

namespace aer {

// Entropy sums are whole multiples of 2^-30 nat: integer addition is associative, so a total does not depend on
// the order of updates or on how a batch was split.
constexpr double kEntropyUnit = 1.0 / (1LL << 30);
constexpr std::int64_t kEntropyMax = INT64_MAX / 2;
constexpr double kNatsMax = static_cast<double>(kEntropyMax) * kEntropyUnit;
// Decayed sums are rounded to multiples of 2^-32 whenever they decay, so that adding whole rollouts to them is exact.
constexpr double kDecayedUnit = 1.0 / (1LL << 32);
constexpr std::uint32_t kCountMax = UINT32_MAX;
constexpr std::int64_t kStepMax = INT32_MAX;

// Round half to even for 0 <= x: the standard's functions are library calls on baseline x86-64.
inline double round_even(double x) {
    constexpr double kInteger = 4503599627370496.0;  // from 2^52 on every double is an integer
    return x < kInteger ? (x + kInteger) - kInteger : x;
}

inline std::int64_t entropy_units(double nats) { return static_cast<std::int64_t>(round_even(nats / kEntropyUnit)); }

struct Record {
    std::uint64_t key;         // splitmix64(prompt id): places the record in the table and orders it in the file
    double decayed_successes;  // as of last_step
    double decayed_failures;   // as of last_step
    std::int64_t entropy_sum;  // in kEntropyUnit
    std::uint32_t token_count;
    std::uint32_t attempts;
    std::uint32_t successes;
    std::int32_t last_step;

    std::uint64_t prompt_id() const { return splitmix64_inverse(key); }
};

static_assert(sizeof(Record) == 48 && std::is_trivially_copyable_v<Record>, "the file format depends on this layout");

}  // namespace aer

// The ledger's forgetting: decay^steps, and sums kept on the grid of record.hpp whenever they decay.
#pragma once

#include <array>
#include <cstdint>

#include "aer/record.hpp"

namespace aer {

class Decay {
  public:
    // Throws std::invalid_argument unless 0 < factor <= 1.
    explicit Decay(double factor);

    double factor() const { return powers_[1]; }
    // decay^steps by multiplications alone: std::pow differs between C libraries, and ranks must agree to the bit.
    double power(std::int64_t steps) const {
        return steps < kTable ? powers_[static_cast<std::size_t>(steps)] : large_power(steps);
    }
    // A sum of `steps` ago. The identity for 0 steps: a sum on the grid is a whole number of units.
    static double decayed(double sum, double power) { return round_even(sum * power / kDecayedUnit) * kDecayedUnit; }

  private:
    static constexpr std::int64_t kTable = 256;

    double large_power(std::int64_t steps) const;

    std::array<double, kTable> powers_;
};

}  // namespace aer

// Splitting weighted sequences into parts of nearly equal weight.
#pragma once

#include <cstdint>
#include <vector>

#include "aer/span.hpp"

namespace aer {

// The part of each of B sequences. Both longest-first (LPT) and Karmarkar and Karp's differencing method are run, and
// the one with the smaller heaviest part is kept. With equal_size no part holds more than one sequence more than
// another. No part is empty; parts are numbered by their first sequence; ties fall to the earlier sequence, so that
// every rank computes the same answer. Throws std::invalid_argument unless 1 <= num_parts <= B and all weights are >=
// 0.
std::vector<std::int64_t> balanced_partition(Span<const std::int64_t> weights, std::int64_t num_parts, bool equal_size);

}  // namespace aer

// Read-only questions about a whole ledger. Difficulty is 1 - posterior mean success rate at `step`. Both functions
// throw std::invalid_argument for bad arguments.
#pragma once

#include <cstdint>
#include <vector>

#include "aer/ledger.hpp"
#include "aer/span.hpp"

namespace aer {

// Row-major [difficulty bins][entropy bins] counts of prompts with tokens; entropy is nats per token. Bins are
// [e_i, e_i+1), the last one closed; prompts outside are not counted.
std::vector<std::int64_t> histogram2d(const Ledger& ledger, Span<const double> difficulty_edges,
                                      Span<const double> entropy_edges, BetaPrior prior, std::int64_t step);

// Difficulty quantiles, linearly interpolated between order statistics.
std::vector<double> difficulty_quantiles(const Ledger& ledger, Span<const double> q, BetaPrior prior,
                                         std::int64_t step);

}  // namespace aer

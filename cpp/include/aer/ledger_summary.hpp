// Read-only questions about a whole ledger. Difficulty is 1 - posterior mean success rate at `step`; ties fall to the
// smaller prompt id.
#pragma once

#include <cstdint>
#include <vector>

#include "aer/ledger.hpp"
#include "aer/span.hpp"

namespace aer {

enum class Ranking {
    kHardest,  // lowest posterior mean first
    kEasiest,  // highest posterior mean first
    kNever,    // attempted and never solved, most attempts first
    kAlways,   // always solved, most attempts first
};

// At most k prompt ids. All functions throw std::invalid_argument for bad arguments.
std::vector<std::uint64_t> top_k(const Ledger& ledger, std::int64_t k, Ranking ranking, BetaPrior prior,
                                 std::int64_t step);

// Row-major [difficulty bins][entropy bins] counts of prompts with tokens; entropy is nats per token. Bins are
// [e_i, e_i+1), the last one closed; prompts outside are not counted.
std::vector<std::int64_t> histogram2d(const Ledger& ledger, Span<const double> difficulty_edges,
                                      Span<const double> entropy_edges, BetaPrior prior, std::int64_t step);

// Difficulty quantiles, linearly interpolated between order statistics.
std::vector<double> difficulty_quantiles(const Ledger& ledger, Span<const double> q, BetaPrior prior,
                                         std::int64_t step);

}  // namespace aer

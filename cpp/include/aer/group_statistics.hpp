// Per-group success counts, mean, standard deviation and the group-relative advantage (GRPO).
#pragma once

#include <cstdint>
#include <vector>

#include "aer/span.hpp"

namespace aer {

// Groups are numbered in the order of their first appearance; P groups, B rollouts.
struct GroupStatistics {
    std::vector<std::int64_t> group_ids;    // [P]
    std::vector<std::int64_t> counts;       // [P]
    std::vector<std::int64_t> successes;    // [P] rewards >= 1
    std::vector<double> mean;               // [P]
    std::vector<double> std;                // [P] unbiased (n - 1); 0 for one rollout
    std::vector<double> advantage;          // [B] (R - mean) / (std + std_epsilon), or R - mean
    std::vector<std::int64_t> group_index;  // [B] position of the rollout's group in the arrays above
};

// Throws std::invalid_argument for unequal lengths, a reward that is not finite or a negative std_epsilon.
GroupStatistics group_statistics(Span<const std::int64_t> group_ids, Span<const double> rewards, double std_epsilon,
                                 bool divide_by_std);

}  // namespace aer

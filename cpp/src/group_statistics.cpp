#include "aer/group_statistics.hpp"

#include <cmath>
#include <stdexcept>

#include "aer/hashing.hpp"
#include "aer/message.hpp"

namespace aer {
namespace {

// Neumaier's compensated sum: the mean of equal rewards is that reward, so their deviations are exactly zero.
struct CompensatedSum {
    double sum = 0.0;
    double lost = 0.0;

    void add(double x) {
        const double next = sum + x;
        lost += std::fabs(sum) >= std::fabs(x) ? (sum - next) + x : (x - next) + sum;
        sum = next;
    }
    double total() const { return sum + lost; }
};

// group id -> number of the group, by order of first appearance.
class GroupIndex {
  public:
    explicit GroupIndex(std::size_t most) {
        std::size_t slots = 16;
        while (slots < 2 * most) slots *= 2;
        slots_.assign(slots, -1);
    }
    std::int64_t find_or_add(std::int64_t id, std::vector<std::int64_t>& ids) {
        const std::size_t mask = slots_.size() - 1;
        for (std::size_t slot = splitmix64(static_cast<std::uint64_t>(id)) & mask;; slot = (slot + 1) & mask) {
            if (slots_[slot] < 0) {
                slots_[slot] = static_cast<std::int64_t>(ids.size());
                ids.push_back(id);
            }
            if (ids[static_cast<std::size_t>(slots_[slot])] == id) return slots_[slot];
        }
    }

  private:
    std::vector<std::int64_t> slots_;
};

}  // namespace

GroupStatistics group_statistics(Span<const std::int64_t> group_ids, Span<const double> rewards, double std_epsilon,
                                 bool divide_by_std) {
    const std::size_t num_rollouts = group_ids.size;
    if (rewards.size != num_rollouts)
        throw std::invalid_argument(message("group_statistics: ", num_rollouts, " group_ids but ", rewards.size,
                                            " rewards; pass one of each per rollout"));
    if (!(std::isfinite(std_epsilon) && std_epsilon >= 0.0))
        throw std::invalid_argument(message("std_epsilon=", std_epsilon, " must be finite and >= 0"));
    GroupStatistics result;
    result.group_index.resize(num_rollouts);
    GroupIndex index(num_rollouts);
    std::vector<CompensatedSum> sums;
    for (std::size_t i = 0; i < num_rollouts; ++i) {
        if (!std::isfinite(rewards[i]))
            throw std::invalid_argument(message("group_statistics: rewards[", i, "]=", rewards[i], " must be finite"));
        const std::int64_t group = index.find_or_add(group_ids[i], result.group_ids);
        const auto g = static_cast<std::size_t>(group);
        if (g == sums.size()) {
            sums.emplace_back();
            result.counts.push_back(0);
            result.successes.push_back(0);
        }
        sums[g].add(rewards[i]);
        ++result.counts[g];
        result.successes[g] += rewards[i] >= 1.0;
        result.group_index[i] = group;
    }
    const std::size_t num_groups = result.group_ids.size();
    result.mean.resize(num_groups);
    for (std::size_t g = 0; g < num_groups; ++g)
        result.mean[g] = sums[g].total() / static_cast<double>(result.counts[g]);

    std::vector<CompensatedSum> squares(num_groups);
    result.advantage.resize(num_rollouts);
    for (std::size_t i = 0; i < num_rollouts; ++i) {
        const auto g = static_cast<std::size_t>(result.group_index[i]);
        result.advantage[i] = rewards[i] - result.mean[g];
        squares[g].add(result.advantage[i] * result.advantage[i]);
    }
    result.std.resize(num_groups, 0.0);
    for (std::size_t g = 0; g < num_groups; ++g)
        if (result.counts[g] > 1)
            result.std[g] = std::sqrt(squares[g].total() / static_cast<double>(result.counts[g] - 1));
    if (divide_by_std)
        for (std::size_t i = 0; i < num_rollouts; ++i)
            if (result.advantage[i] != 0.0)
                result.advantage[i] /= result.std[static_cast<std::size_t>(result.group_index[i])] + std_epsilon;
    return result;
}

}  // namespace aer

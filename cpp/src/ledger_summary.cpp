#include "aer/ledger_summary.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "aer/message.hpp"

namespace aer {
namespace {

void check_edges(const char* name, Span<const double> edges) {
    bool ascending = edges.size >= 2;
    for (std::size_t i = 0; i + 1 < edges.size; ++i) ascending = ascending && edges[i] < edges[i + 1];
    if (!ascending) throw std::invalid_argument(message(name, " must hold at least two strictly ascending values"));
}

// The bin of x, or -1 outside of the edges.
std::ptrdiff_t bin_of(Span<const double> edges, double x) {
    if (x == edges[edges.size - 1]) return static_cast<std::ptrdiff_t>(edges.size) - 2;
    const double* above = std::upper_bound(edges.begin(), edges.end(), x);
    return above == edges.end() ? -1 : above - edges.begin() - 1;
}

}  // namespace

std::vector<std::int64_t> histogram2d(const Ledger& ledger, Span<const double> difficulty_edges,
                                      Span<const double> entropy_edges, BetaPrior prior, std::int64_t step) {
    check_prior(prior);
    check_step(step);
    check_edges("difficulty_edges", difficulty_edges);
    check_edges("entropy_edges", entropy_edges);
    const std::size_t columns = entropy_edges.size - 1;
    std::vector<std::int64_t> counts((difficulty_edges.size - 1) * columns, 0);
    ledger.visit([&](const Record& record) {
        if (record.token_count == 0) return;
        const double entropy = static_cast<double>(record.entropy_sum) * kEntropyUnit / record.token_count;
        const std::ptrdiff_t row = bin_of(difficulty_edges, 1.0 - ledger.posterior_mean(record, prior, step));
        const std::ptrdiff_t column = bin_of(entropy_edges, entropy);
        if (row >= 0 && column >= 0)
            ++counts[static_cast<std::size_t>(row) * columns + static_cast<std::size_t>(column)];
    });
    return counts;
}

std::vector<double> difficulty_quantiles(const Ledger& ledger, Span<const double> q, BetaPrior prior,
                                         std::int64_t step) {
    check_prior(prior);
    check_step(step);
    for (std::size_t i = 0; i < q.size; ++i)
        if (!(q[i] >= 0.0 && q[i] <= 1.0))
            throw std::invalid_argument(message("q[", i, "]=", q[i], " must be in [0, 1]"));
    std::vector<double> difficulties;
    ledger.visit(
        [&](const Record& record) { difficulties.push_back(1.0 - ledger.posterior_mean(record, prior, step)); });
    if (difficulties.empty()) throw std::invalid_argument("quantiles: the ledger is empty");
    std::sort(difficulties.begin(), difficulties.end());
    std::vector<double> values(q.size);
    for (std::size_t i = 0; i < q.size; ++i) {
        const double place = q[i] * static_cast<double>(difficulties.size() - 1);
        const auto below = static_cast<std::size_t>(place);
        const double fraction = place - static_cast<double>(below);
        const double low = difficulties[below];
        const double high = difficulties[std::min(below + 1, difficulties.size() - 1)];
        values[i] = fraction < 0.5 ? low + (high - low) * fraction : high - (high - low) * (1.0 - fraction);
    }
    return values;
}

}  // namespace aer

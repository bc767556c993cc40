#include "aer/ledger_summary.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "aer/message.hpp"

namespace aer {
namespace {

struct Ranked {
    double key;
    std::uint64_t prompt_id;

    bool operator<(const Ranked& other) const {
        return key != other.key ? key < other.key : prompt_id < other.prompt_id;
    }
};

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

std::vector<std::uint64_t> top_k(const Ledger& ledger, std::int64_t k, Ranking ranking, BetaPrior prior,
                                 std::int64_t step) {
    if (k < 0) throw std::invalid_argument(message("k=", k, " must be >= 0"));
    check_prior(prior);
    check_step(step);
    std::vector<Ranked> ranked;
    ledger.visit([&](const Record& record) {
        switch (ranking) {
            case Ranking::kHardest:
                ranked.push_back({ledger.posterior_mean(record, prior, step), record.prompt_id()});
                break;
            case Ranking::kEasiest:
                ranked.push_back({-ledger.posterior_mean(record, prior, step), record.prompt_id()});
                break;
            case Ranking::kNever:
                if (record.attempts > 0 && record.successes == 0)
                    ranked.push_back({-static_cast<double>(record.attempts), record.prompt_id()});
                break;
            case Ranking::kAlways:
                if (record.attempts > 0 && record.successes == record.attempts)
                    ranked.push_back({-static_cast<double>(record.attempts), record.prompt_id()});
                break;
        }
    });
    const std::size_t n = std::min(ranked.size(), static_cast<std::size_t>(k));
    const auto cut = ranked.begin() + static_cast<std::ptrdiff_t>(n);
    if (n < ranked.size()) std::nth_element(ranked.begin(), cut, ranked.end());
    std::sort(ranked.begin(), cut);
    std::vector<std::uint64_t> prompt_ids(n);
    std::transform(ranked.begin(), cut, prompt_ids.begin(), [](const Ranked& r) { return r.prompt_id; });
    return prompt_ids;
}

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

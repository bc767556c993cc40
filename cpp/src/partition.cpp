#include "aer/partition.hpp"

#include <algorithm>
#include <numeric>
#include <queue>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "aer/message.hpp"

namespace aer {
namespace {

using Parts = std::vector<std::int64_t>;  // part of each sequence

std::vector<std::size_t> heaviest_first(Span<const std::int64_t> weights) {
    std::vector<std::size_t> order(weights.size);
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return weights[a] > weights[b]; });
    return order;
}

// Graham's rule: the longest sequence left goes to the lightest part (that still has room).
Parts longest_first(Span<const std::int64_t> weights, std::size_t num_parts, bool equal_size) {
    struct Part {
        std::int64_t sum;
        std::size_t size, index;
        bool operator>(const Part& other) const {
            return std::tie(sum, size, index) > std::tie(other.sum, other.size, other.index);
        }
    };
    std::priority_queue<Part, std::vector<Part>, std::greater<>> open;
    for (std::size_t p = 0; p < num_parts; ++p) open.push({0, 0, p});
    const std::size_t floor = weights.size / num_parts;
    std::size_t num_larger = weights.size % num_parts;  // parts that may hold floor + 1
    Parts parts(weights.size);
    for (const std::size_t i : heaviest_first(weights)) {
        Part part = open.top();
        open.pop();
        while (equal_size && part.size == floor && num_larger == 0) {
            part = open.top();
            open.pop();
        }
        if (equal_size && part.size == floor) --num_larger;
        parts[i] = static_cast<std::int64_t>(part.index);
        part.sum += weights[i];
        ++part.size;
        if (!equal_size || part.size <= floor) open.push(part);
    }
    return parts;
}

// A linked list of sequences and its weight.
struct Bundle {
    std::int64_t sum;
    std::size_t head, tail;
};

// Up to num_parts bundles, heaviest first; absent ones are empty. `spread` is what is left to balance.
struct Differencing {
    std::vector<Bundle> bundles;
    std::int64_t spread;
    std::size_t serial;

    bool operator<(const Differencing& other) const {
        return spread != other.spread ? spread < other.spread : serial > other.serial;
    }
};

Differencing make_differencing(std::vector<Bundle> bundles, std::size_t num_parts, std::size_t serial) {
    std::sort(bundles.begin(), bundles.end(),
              [](const Bundle& a, const Bundle& b) { return a.sum != b.sum ? a.sum > b.sum : a.head < b.head; });
    const std::int64_t least = bundles.size() < num_parts ? 0 : bundles.back().sum;
    const std::int64_t spread = bundles.front().sum - least;
    return {std::move(bundles), spread, serial};
}

// The largest differencing method for num_parts parts: repeatedly joins the two most uneven partial answers, heavy
// bundles with light ones. equal_size starts from answers with one sequence per part, padded by weightless ones.
Parts karmarkar_karp(Span<const std::int64_t> weights, std::size_t num_parts, bool equal_size) {
    std::vector<std::size_t> order = heaviest_first(weights);
    const std::size_t n = weights.size;
    const std::size_t padded = equal_size ? (n + num_parts - 1) / num_parts * num_parts : n;
    for (std::size_t i = n; i < padded; ++i) order.push_back(i);
    std::vector<std::size_t> next(padded, SIZE_MAX);
    const std::size_t width = equal_size ? num_parts : 1;
    std::vector<Differencing> initial;
    for (std::size_t start = 0; start < padded; start += width) {
        std::vector<Bundle> bundles;
        for (std::size_t k = start; k < start + width; ++k)
            bundles.push_back({order[k] < n ? weights[order[k]] : 0, order[k], order[k]});
        initial.push_back(make_differencing(std::move(bundles), num_parts, initial.size()));
    }
    std::size_t serial = initial.size();
    std::make_heap(initial.begin(), initial.end());
    const auto pop = [&initial] {
        std::pop_heap(initial.begin(), initial.end());
        Differencing most = std::move(initial.back());
        initial.pop_back();
        return most;
    };
    while (initial.size() > 1) {
        Differencing a = pop();
        const Differencing b = pop();
        for (std::size_t j = b.bundles.size(); j-- > 0;) {
            const std::size_t i = num_parts - 1 - j;
            if (i < a.bundles.size()) {
                Bundle& joined = a.bundles[i];
                joined.sum += b.bundles[j].sum;
                next[joined.tail] = b.bundles[j].head;
                joined.tail = b.bundles[j].tail;
            }
        }
        const std::size_t alone = std::min(b.bundles.size(), num_parts - std::min(a.bundles.size(), num_parts));
        a.bundles.insert(a.bundles.end(), b.bundles.begin(), b.bundles.begin() + static_cast<std::ptrdiff_t>(alone));
        initial.push_back(make_differencing(std::move(a.bundles), num_parts, serial++));
        std::push_heap(initial.begin(), initial.end());
    }
    Parts parts(n);
    for (std::size_t p = 0; p < initial.front().bundles.size(); ++p)
        for (std::size_t i = initial.front().bundles[p].head; i != SIZE_MAX; i = next[i])
            if (i < n) parts[i] = static_cast<std::int64_t>(p);
    return parts;
}

// (heaviest part, heaviest - lightest)
std::pair<std::int64_t, std::int64_t> cost(Span<const std::int64_t> weights, const Parts& parts,
                                           std::size_t num_parts) {
    std::vector<std::int64_t> sums(num_parts, 0);
    for (std::size_t i = 0; i < parts.size(); ++i) sums[static_cast<std::size_t>(parts[i])] += weights[i];
    const auto [least, most] = std::minmax_element(sums.begin(), sums.end());
    return {*most, *most - *least};
}

}  // namespace

std::vector<std::int64_t> balanced_partition(Span<const std::int64_t> weights, std::int64_t num_parts,
                                             bool equal_size) {
    if (num_parts < 1 || static_cast<std::uint64_t>(num_parts) > weights.size)
        throw std::invalid_argument(
            message("num_parts=", num_parts, " must be in [1, ", weights.size, "], the number of weights"));
    std::int64_t total = 0;
    for (std::size_t i = 0; i < weights.size; ++i) {
        if (weights[i] < 0) throw std::invalid_argument(message("weights[", i, "]=", weights[i], " must be >= 0"));
        if (weights[i] > INT64_MAX - total) throw std::invalid_argument("the sum of the weights must fit into 64 bits");
        total += weights[i];
    }
    const auto count = static_cast<std::size_t>(num_parts);
    Parts best = karmarkar_karp(weights, count, equal_size);
    Parts other = longest_first(weights, count, equal_size);
    if (cost(weights, other, count) < cost(weights, best, count)) best.swap(other);
    std::vector<std::int64_t> number(count, -1);
    std::int64_t used = 0;
    for (std::int64_t& part : best) {
        std::int64_t& label = number[static_cast<std::size_t>(part)];
        if (label < 0) label = used++;
        part = label;
    }
    return best;
}

}  // namespace aer

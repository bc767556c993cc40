// The difficulty ledger: what every prompt's rollouts have shown so far, forgotten at a chosen rate.
//
// A prompt's decayed sums at step t are  sum over its updates u of  count_u * decay^(t - step_u).
// All sums are exact on a fixed grid (record.hpp), so that a step's batch may be split and reordered with the same bits
// as a result; only forgetting rounds (to 2^-32 of a rollout).
// Every public function is safe to call from several threads: readers share, writers are alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <shared_mutex>
#include <string>
#include <vector>

#include "aer/decay.hpp"
#include "aer/record_table.hpp"
#include "aer/span.hpp"

namespace aer {

// What one rollout batch adds; entry i belongs to prompt_ids[i], and a prompt may appear several times.
struct LedgerBatch {
    Span<const std::uint64_t> prompt_ids;
    Span<const std::int64_t> attempts;
    Span<const std::int64_t> successes;
    Span<const double> entropy_sum;  // nats
    Span<const std::int64_t> token_count;
};

struct LedgerRows {
    std::vector<std::uint64_t> prompt_ids;
    std::vector<double> decayed_successes;  // as of last_step
    std::vector<double> decayed_failures;   // as of last_step
    std::vector<std::int64_t> attempts;
    std::vector<std::int64_t> successes;
    std::vector<std::int64_t> last_step;  // -1: prompt unknown
    std::vector<double> entropy_sum;      // nats
    std::vector<std::int64_t> token_count;
};

struct BetaPrior {
    double success;
    double failure;
};

class Ledger {
  public:
    // Throws std::invalid_argument unless 0 < decay <= 1 and capacity_hint >= 0.
    Ledger(double decay, std::int64_t capacity_hint);

    double decay() const { return decay_.factor(); }
    std::size_t size() const;
    std::size_t nbytes() const;

    // All or nothing: throws std::invalid_argument before anything is changed.
    void update(const LedgerBatch& batch, std::int64_t step);
    std::unique_ptr<Ledger> copy() const;

    LedgerRows lookup(Span<const std::uint64_t> prompt_ids) const;
    LedgerRows export_rows() const;
    // (a + ds) / (a + ds + b + df), the decayed sums taken at `step`; a / (a + b) where a prompt is unknown.
    std::vector<double> posterior_mean(Span<const std::uint64_t> prompt_ids, BetaPrior prior, std::int64_t step) const;
    // The same of one record; throws std::invalid_argument when the record is from a later step.
    double posterior_mean(const Record& record, BetaPrior prior, std::int64_t step) const;
    // Calls `visitor` with every record, in the order of keys.
    void visit(const std::function<void(const Record&)>& visitor) const;

    bool equals(const Ledger& other) const;

    // Throws std::system_error where the system refuses, std::invalid_argument (naming file and cause) for bad content.
    void save(const std::string& path) const;
    static std::unique_ptr<Ledger> load(const std::string& path, std::optional<double> decay);

  private:
    std::vector<const Record*> checked_records(const LedgerBatch& batch, std::int64_t step) const;
    void check_sums(const LedgerBatch& batch) const;

    Decay decay_;
    RecordTable table_;
    mutable std::shared_mutex mutex_;
};

void check_prior(BetaPrior prior);
void check_step(std::int64_t step);

}  // namespace aer

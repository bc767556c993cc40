#include "aer/ledger.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>
#include <stdexcept>

#include "aer/message.hpp"

namespace aer {
namespace {

using ReadLock = std::shared_lock<std::shared_mutex>;
using WriteLock = std::unique_lock<std::shared_mutex>;

Record unknown(std::uint64_t prompt_id) { return {prompt_id, 0.0, 0.0, 0, 0, 0, 0, -1}; }

std::int64_t entropy_units(double nats) { return static_cast<std::int64_t>(round_even(nats / kEntropyUnit)); }

void check_batch(const LedgerBatch& batch) {
    const std::size_t n = batch.prompt_ids.size;
    if (batch.attempts.size != n || batch.successes.size != n || batch.entropy_sum.size != n || batch.token_count.size != n)
        throw std::invalid_argument("update: prompt_ids, attempts, successes, entropy_sum and token_count must have one length");
    for (std::size_t i = 0; i < n; ++i) {
        const auto fail = [&](const auto&... what) {
            throw std::invalid_argument(message("update: prompt ", batch.prompt_ids[i], " (index ", i, "): ", what...));
        };
        if (batch.attempts[i] < 0 || batch.attempts[i] > kCountMax)
            fail("attempts=", batch.attempts[i], " must be in [0, ", kCountMax, "]");
        if (batch.successes[i] < 0 || batch.successes[i] > batch.attempts[i])
            fail("successes=", batch.successes[i], " must be in [0, attempts=", batch.attempts[i], "]");
        if (!(batch.entropy_sum[i] >= 0.0 && batch.entropy_sum[i] <= kEntropyMax * kEntropyUnit))
            fail("entropy_sum=", batch.entropy_sum[i], " must be in [0, ", kEntropyMax * kEntropyUnit, "] nats");
        if (batch.token_count[i] < 0 || batch.token_count[i] > kCountMax)
            fail("token_count=", batch.token_count[i], " must be in [0, ", kCountMax, "]");
    }
}

Record batch_record(const LedgerBatch& batch, std::size_t i, std::int64_t step) {
    return Record{batch.prompt_ids[i],
                  static_cast<double>(batch.successes[i]),
                  static_cast<double>(batch.attempts[i] - batch.successes[i]),
                  entropy_units(batch.entropy_sum[i]),
                  static_cast<std::uint32_t>(batch.token_count[i]),
                  static_cast<std::uint32_t>(batch.attempts[i]),
                  static_cast<std::uint32_t>(batch.successes[i]),
                  static_cast<std::int32_t>(step)};
}

Record row_record(const LedgerRowsView& rows, std::size_t i) {
    const auto fail = [&](const auto&... what) {
        throw std::invalid_argument(message("merge_state: prompt ", rows.prompt_ids[i], " (row ", i, "): ", what...));
    };
    if (i > 0 && rows.prompt_ids[i] <= rows.prompt_ids[i - 1])
        fail("prompt_ids must be strictly ascending, as export() gives them");
    if (rows.attempts[i] < 0 || rows.attempts[i] > kCountMax) fail("attempts=", rows.attempts[i], " is out of range");
    if (rows.successes[i] < 0 || rows.successes[i] > rows.attempts[i])
        fail("successes=", rows.successes[i], " must be in [0, attempts=", rows.attempts[i], "]");
    if (rows.token_count[i] < 0 || rows.token_count[i] > kCountMax)
        fail("token_count=", rows.token_count[i], " is out of range");
    if (rows.last_step[i] < 0 || rows.last_step[i] > kStepMax)
        fail("last_step=", rows.last_step[i], " must be in [0, ", kStepMax, "]");
    if (!(rows.entropy_sum[i] >= 0.0 && rows.entropy_sum[i] <= kEntropyMax * kEntropyUnit))
        fail("entropy_sum=", rows.entropy_sum[i], " is out of range");
    for (const double sum : {rows.decayed_successes[i], rows.decayed_failures[i]})
        if (!(sum >= 0.0 && sum <= kCountMax)) fail("decayed sum ", sum, " must be in [0, ", kCountMax, "]");
    return Record{rows.prompt_ids[i],
                  rows.decayed_successes[i],
                  rows.decayed_failures[i],
                  entropy_units(rows.entropy_sum[i]),
                  static_cast<std::uint32_t>(rows.token_count[i]),
                  static_cast<std::uint32_t>(rows.attempts[i]),
                  static_cast<std::uint32_t>(rows.successes[i]),
                  static_cast<std::int32_t>(rows.last_step[i])};
}

// The largest lifetime totals among the records that a batch touches. The whole batch on top of them is a bound that
// almost every batch keeps; only where it fails are the batch's sums per prompt worth their sorting.
struct Totals {
    std::uint64_t attempts, tokens;
    std::int64_t entropy;

    void raise(const Record& record) {
        attempts = std::max<std::uint64_t>(attempts, record.attempts);
        tokens = std::max<std::uint64_t>(tokens, record.token_count);
        entropy = std::max(entropy, record.entropy_sum);
    }
    bool has_room_for(const LedgerBatch& batch) const {
        std::uint64_t all_attempts = attempts, all_tokens = tokens;
        double nats = static_cast<double>(entropy) * kEntropyUnit;
        for (std::size_t i = 0; i < batch.prompt_ids.size; ++i) {
            all_attempts += static_cast<std::uint64_t>(batch.attempts[i]);
            all_tokens += static_cast<std::uint64_t>(batch.token_count[i]);
            nats += batch.entropy_sum[i];
        }
        return all_attempts <= kCountMax && all_tokens <= kCountMax && nats <= 0.99 * kEntropyMax * kEntropyUnit;
    }
};

void append_row(LedgerRows& rows, const Record& record) {
    rows.prompt_ids.push_back(record.prompt_id);
    rows.decayed_successes.push_back(record.decayed_successes);
    rows.decayed_failures.push_back(record.decayed_failures);
    rows.attempts.push_back(record.attempts);
    rows.successes.push_back(record.successes);
    rows.last_step.push_back(record.last_step);
    rows.entropy_sum.push_back(static_cast<double>(record.entropy_sum) * kEntropyUnit);
    rows.token_count.push_back(record.token_count);
}

void reserve(LedgerRows& rows, std::size_t n) {
    rows.prompt_ids.reserve(n);
    for (auto* column : {&rows.decayed_successes, &rows.decayed_failures, &rows.entropy_sum}) column->reserve(n);
    for (auto* column : {&rows.attempts, &rows.successes, &rows.last_step, &rows.token_count}) column->reserve(n);
}

}  // namespace

void check_step(std::int64_t step) {
    if (step < 0 || step > kStepMax) throw std::invalid_argument(message("step=", step, " must be in [0, ", kStepMax, "]"));
}

void check_prior(BetaPrior prior) {
    if (!(std::isfinite(prior.success) && std::isfinite(prior.failure) && prior.success > 0.0 && prior.failure > 0.0))
        throw std::invalid_argument(message("prior_success=", prior.success, " and prior_failure=", prior.failure,
                                            " must be finite and positive; 1.0 and 1.0 is the uniform prior"));
}

Ledger::Ledger(double decay, std::int64_t capacity_hint)
    : decay_(decay), table_(capacity_hint > 0 ? static_cast<std::size_t>(capacity_hint) : 0) {
    if (!(decay > 0.0 && decay <= 1.0)) throw std::invalid_argument(message("decay=", decay, " must be in (0, 1]; 1 never forgets"));
    if (capacity_hint < 0) throw std::invalid_argument(message("capacity_hint=", capacity_hint, " must be >= 0"));
    powers_[0] = 1.0;
    for (std::size_t i = 1; i < powers_.size(); ++i) powers_[i] = powers_[i - 1] * decay_;
}

std::size_t Ledger::size() const {
    const ReadLock lock(mutex_);
    return table_.size();
}

std::size_t Ledger::nbytes() const {
    const ReadLock lock(mutex_);
    return sizeof *this - sizeof table_ + table_.nbytes();
}

// decay^steps by multiplications alone: std::pow differs between C libraries, and ranks must agree to the bit.
double Ledger::power(std::int64_t steps) const {
    const std::int64_t last = static_cast<std::int64_t>(powers_.size()) - 1;
    double result = powers_[static_cast<std::size_t>(std::min(steps, last))];
    double square = decay_;
    for (std::int64_t left = steps - std::min(steps, last); left > 0; left >>= 1) {
        if (left & 1) result *= square;
        square *= square;
    }
    return result;
}

double Ledger::decayed(double sum, std::int64_t steps) const {
    if (steps == 0 || decay_ == 1.0) return sum;
    return round_even(sum * power(steps) / kDecayedUnit) * kDecayedUnit;
}

void Ledger::align(Record& record, std::int64_t step) const {
    const std::int64_t steps = step - record.last_step;
    if (steps <= 0) return;
    record.decayed_successes = decayed(record.decayed_successes, steps);
    record.decayed_failures = decayed(record.decayed_failures, steps);
    record.last_step = static_cast<std::int32_t>(step);
}

void Ledger::add(Record& record, const Record& other) const {
    Record aligned = other;
    align(record, aligned.last_step);
    align(aligned, record.last_step);
    record.decayed_successes += aligned.decayed_successes;
    record.decayed_failures += aligned.decayed_failures;
    record.entropy_sum += aligned.entropy_sum;
    record.token_count += aligned.token_count;
    record.attempts += aligned.attempts;
    record.successes += aligned.successes;
}

void Ledger::check_sum(const Record& record, const Record& other) const {
    const auto fail = [&](const char* what) {
        throw std::invalid_argument(message("prompt ", record.prompt_id, ": its lifetime ", what, " would leave the ledger's range"));
    };
    if (std::uint64_t{record.attempts} + other.attempts > kCountMax) fail("attempts");
    if (std::uint64_t{record.token_count} + other.token_count > kCountMax) fail("token_count");
    if (record.entropy_sum > kEntropyMax - other.entropy_sum) fail("entropy_sum");
}

// The exact form of Totals::has_room_for, by sorting the batch.
void Ledger::check_capacity(const LedgerBatch& batch, const std::vector<std::uint32_t>& positions) const {
    std::vector<std::size_t> order(positions.size());
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
    std::sort(order.begin(), order.end(),
              [&](std::size_t a, std::size_t b) { return batch.prompt_ids[a] < batch.prompt_ids[b]; });
    Record sum{};
    for (std::size_t k = 0; k < order.size(); ++k) {
        const std::size_t i = order[k];
        if (k == 0 || batch.prompt_ids[order[k - 1]] != batch.prompt_ids[i])
            sum = positions[i] == RecordTable::kAbsent ? Record{batch.prompt_ids[i], 0, 0, 0, 0, 0, 0, 0} : table_.at(positions[i]);
        const Record added = batch_record(batch, i, 0);
        check_sum(sum, added);
        sum.attempts += added.attempts;
        sum.token_count += added.token_count;
        sum.entropy_sum += added.entropy_sum;
    }
}

void Ledger::update(const LedgerBatch& batch, std::int64_t step) {
    check_step(step);
    check_batch(batch);
    const std::size_t n = batch.prompt_ids.size;
    std::vector<std::uint32_t> positions(n);
    Totals most{};
    const WriteLock lock(mutex_);
    table_.find_each(batch.prompt_ids, [&](std::size_t i, std::uint32_t position) {
        positions[i] = position;
        if (position == RecordTable::kAbsent) return;
        const Record& record = table_.at(position);
        if (record.last_step > step)
            throw std::invalid_argument(message("update: prompt ", record.prompt_id, " was last updated at step ", record.last_step,
                                                "; step=", step, " would go back; pass a step >= ", record.last_step));
        most.raise(record);
    });
    if (!most.has_room_for(batch)) check_capacity(batch, positions);
    constexpr std::size_t kAhead = 24;
    for (std::size_t i = 0; i < n; ++i) {
        if (i + kAhead < n && positions[i + kAhead] != RecordTable::kAbsent) table_.prefetch(positions[i + kAhead]);
        const Record added = batch_record(batch, i, step);
        add(positions[i] == RecordTable::kAbsent ? table_.find_or_insert(batch.prompt_ids[i]) : table_.at(positions[i]), added);
    }
}

void Ledger::merge(const Ledger& other) {
    if (this == &other) throw std::invalid_argument("merge: a ledger cannot be merged with itself; that would count twice");
    WriteLock mine(mutex_, std::defer_lock);
    ReadLock theirs(other.mutex_, std::defer_lock);
    std::lock(mine, theirs);
    if (decay_ != other.decay_)
        throw std::invalid_argument(message("merge: decay ", decay_, " here, ", other.decay_, " in the other ledger; they must be equal"));
    const auto n = static_cast<std::uint32_t>(other.table_.size());
    for (std::uint32_t i = 0; i < n; ++i) {
        const std::uint32_t position = table_.find(other.table_.at(i).prompt_id);
        if (position != RecordTable::kAbsent) check_sum(table_.at(position), other.table_.at(i));
    }
    for (std::uint32_t i = 0; i < n; ++i) add(table_.find_or_insert(other.table_.at(i).prompt_id), other.table_.at(i));
}

void Ledger::merge(const LedgerRowsView& rows) {
    const std::size_t n = rows.prompt_ids.size;
    for (const std::size_t size : {rows.decayed_successes.size, rows.decayed_failures.size, rows.attempts.size, rows.successes.size,
                                   rows.last_step.size, rows.entropy_sum.size, rows.token_count.size})
        if (size != n) throw std::invalid_argument("merge_state: all columns must have one length");
    std::vector<Record> records(n);
    for (std::size_t i = 0; i < n; ++i) records[i] = row_record(rows, i);
    const WriteLock lock(mutex_);
    for (const Record& record : records) {
        const std::uint32_t position = table_.find(record.prompt_id);
        if (position != RecordTable::kAbsent) check_sum(table_.at(position), record);
    }
    for (const Record& record : records) add(table_.find_or_insert(record.prompt_id), record);
}

LedgerRows Ledger::lookup(Span<const std::uint64_t> prompt_ids) const {
    LedgerRows rows;
    reserve(rows, prompt_ids.size);
    const ReadLock lock(mutex_);
    table_.find_each(prompt_ids, [&](std::size_t i, std::uint32_t position) {
        append_row(rows, position == RecordTable::kAbsent ? unknown(prompt_ids[i]) : table_.at(position));
    });
    return rows;
}

LedgerRows Ledger::export_rows() const {
    const ReadLock lock(mutex_);
    LedgerRows rows;
    reserve(rows, table_.size());
    for (const std::uint32_t position : table_.sorted_positions()) append_row(rows, table_.at(position));
    return rows;
}

double Ledger::posterior_mean(const Record& record, BetaPrior prior, std::int64_t step) const {
    const std::int64_t steps = record.last_step < 0 ? 0 : step - record.last_step;
    if (steps < 0)
        throw std::invalid_argument(message("posterior mean: prompt ", record.prompt_id, " was last updated at step ",
                                            record.last_step, ", after step=", step, "; pass a step >= ", record.last_step));
    const double factor = power(steps);
    const double successes = prior.success + record.decayed_successes * factor;
    return successes / (successes + (prior.failure + record.decayed_failures * factor));
}

std::vector<double> Ledger::posterior_mean(Span<const std::uint64_t> prompt_ids, BetaPrior prior, std::int64_t step) const {
    check_prior(prior);
    check_step(step);
    std::vector<double> means(prompt_ids.size);
    const ReadLock lock(mutex_);
    table_.find_each(prompt_ids, [&](std::size_t i, std::uint32_t position) {
        means[i] = posterior_mean(position == RecordTable::kAbsent ? unknown(prompt_ids[i]) : table_.at(position), prior, step);
    });
    return means;
}

void Ledger::visit(const std::function<void(const Record&)>& visitor) const {
    const ReadLock lock(mutex_);
    for (std::uint32_t i = 0; i < table_.size(); ++i) visitor(table_.at(i));
}

bool Ledger::equals(const Ledger& other) const {
    if (this == &other) return true;
    ReadLock mine(mutex_, std::defer_lock);
    ReadLock theirs(other.mutex_, std::defer_lock);
    std::lock(mine, theirs);
    if (decay_ != other.decay_ || table_.size() != other.table_.size()) return false;
    for (std::uint32_t i = 0; i < table_.size(); ++i) {
        const std::uint32_t position = other.table_.find(table_.at(i).prompt_id);
        if (position == RecordTable::kAbsent || std::memcmp(&table_.at(i), &other.table_.at(position), sizeof(Record)) != 0)
            return false;
    }
    return true;
}

}  // namespace aer

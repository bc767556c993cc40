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

// What is known of a prompt that never came.
Record unknown(std::uint64_t prompt_id) { return {splitmix64(prompt_id), 0.0, 0.0, 0, 0, 0, 0, -1}; }

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
    const double wins = rows.decayed_successes[i], losses = rows.decayed_failures[i];
    const auto most_losses = static_cast<double>(rows.attempts[i] - rows.successes[i]);
    if (!(wins >= 0.0 && wins <= static_cast<double>(rows.successes[i])))
        fail("decayed sum of successes ", wins, " must be in [0, successes=", rows.successes[i], "]");
    if (!(losses >= 0.0 && losses <= most_losses))
        fail("decayed sum of failures ", losses, " must be in [0, attempts - successes=", most_losses, "]");
    return Record{splitmix64(rows.prompt_ids[i]),
                  Decay::decayed(rows.decayed_successes[i], 1.0),
                  Decay::decayed(rows.decayed_failures[i], 1.0),
                  entropy_units(rows.entropy_sum[i]),
                  static_cast<std::uint32_t>(rows.token_count[i]),
                  static_cast<std::uint32_t>(rows.attempts[i]),
                  static_cast<std::uint32_t>(rows.successes[i]),
                  static_cast<std::int32_t>(rows.last_step[i])};
}

void check_sum(const Record& record, const Record& other) {
    const auto fail = [&](const char* what) {
        throw std::invalid_argument(
            message("prompt ", record.prompt_id(), ": its lifetime ", what, " would leave the ledger's range"));
    };
    if (std::uint64_t{record.attempts} + other.attempts > kCountMax) fail("attempts");
    if (std::uint64_t{record.token_count} + other.token_count > kCountMax) fail("token_count");
    if (record.entropy_sum > kEntropyMax - other.entropy_sum) fail("entropy_sum");
}

void append_row(LedgerRows& rows, const Record& record) {
    rows.prompt_ids.push_back(record.prompt_id());
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
    if (step < 0 || step > kStepMax)
        throw std::invalid_argument(message("step=", step, " must be in [0, ", kStepMax, "]"));
}

void check_prior(BetaPrior prior) {
    if (!(std::isfinite(prior.success) && std::isfinite(prior.failure) && prior.success > 0.0 && prior.failure > 0.0))
        throw std::invalid_argument(message("prior_success=", prior.success, " and prior_failure=", prior.failure,
                                            " must be finite and positive; 1.0 and 1.0 is the uniform prior"));
}

Decay::Decay(double factor) {
    if (!(factor > 0.0 && factor <= 1.0))
        throw std::invalid_argument(message("decay=", factor, " must be in (0, 1]; 1 never forgets"));
    powers_[0] = 1.0;
    for (std::size_t i = 1; i < powers_.size(); ++i) powers_[i] = powers_[i - 1] * factor;
}

double Decay::large_power(std::int64_t steps) const {
    double result = powers_.back();
    double square = factor();
    for (std::int64_t left = steps - (kTable - 1); left > 0; left >>= 1) {
        if (left & 1) result *= square;
        square *= square;
    }
    return result;
}

void LedgerTotals::raise(const Record& record) {
    attempts = std::max<std::uint64_t>(attempts, record.attempts);
    tokens = std::max<std::uint64_t>(tokens, record.token_count);
    nats = std::max(nats, static_cast<double>(record.entropy_sum) * kEntropyUnit);
}

bool LedgerTotals::has_room_for(const LedgerTotals& added) const {
    return attempts + added.attempts <= kCountMax && tokens + added.tokens <= kCountMax &&
           nats + added.nats <= 0.99 * kEntropyMax * kEntropyUnit;
}

Ledger::Ledger(double decay, std::int64_t capacity_hint)
    : decay_(decay), table_(capacity_hint > 0 ? static_cast<std::size_t>(capacity_hint) : 0) {
    if (capacity_hint < 0) throw std::invalid_argument(message("capacity_hint=", capacity_hint, " must be >= 0"));
}

std::size_t Ledger::size() const {
    const ReadLock lock(mutex_);
    return table_.size();
}

std::size_t Ledger::nbytes() const {
    const ReadLock lock(mutex_);
    return sizeof *this - sizeof table_ + table_.nbytes();
}

void Ledger::add(const Record& other) {
    Record& record = table_.find_or_insert(other.key);
    if (record.last_step < 0) record.last_step = other.last_step;
    Record aligned = other;
    decay_.align(record, aligned.last_step);
    decay_.align(aligned, record.last_step);
    record.decayed_successes += aligned.decayed_successes;
    record.decayed_failures += aligned.decayed_failures;
    record.entropy_sum += aligned.entropy_sum;
    record.token_count += aligned.token_count;
    record.attempts += aligned.attempts;
    record.successes += aligned.successes;
    most_.raise(record);
    newest_step_ = std::max<std::int64_t>(newest_step_, record.last_step);
}

// The exact form of LedgerTotals::has_room_for, by sorting the batch.
void Ledger::check_capacity(std::vector<Record> added) const {
    std::sort(added.begin(), added.end(), [](const Record& a, const Record& b) { return a.key < b.key; });
    Record sum{};
    for (std::size_t i = 0; i < added.size(); ++i) {
        if (i == 0 || added[i - 1].key != added[i].key) {
            const Record* const known = table_.find(added[i].key);
            sum = known != nullptr ? *known : Record{added[i].key, 0.0, 0.0, 0, 0, 0, 0, 0};
        }
        check_sum(sum, added[i]);
        sum.attempts += added[i].attempts;
        sum.token_count += added[i].token_count;
        sum.entropy_sum += added[i].entropy_sum;
    }
}

void Ledger::merge(const Ledger& other) {
    if (this == &other)
        throw std::invalid_argument("merge: a ledger cannot be merged with itself; that would count twice");
    WriteLock mine(mutex_, std::defer_lock);
    ReadLock theirs(other.mutex_, std::defer_lock);
    std::lock(mine, theirs);
    if (decay() != other.decay())
        throw std::invalid_argument(
            message("merge: decay ", decay(), " here, ", other.decay(), " in the other ledger; they must be equal"));
    other.table_.for_each([this](const Record& record) {
        const Record* const known = table_.find(record.key);
        if (known != nullptr) check_sum(*known, record);
    });
    other.table_.for_each([this](const Record& record) { add(record); });
}

void Ledger::merge(const LedgerRowsView& rows) {
    const std::size_t n = rows.prompt_ids.size;
    for (const std::size_t size :
         {rows.decayed_successes.size, rows.decayed_failures.size, rows.attempts.size, rows.successes.size,
          rows.last_step.size, rows.entropy_sum.size, rows.token_count.size})
        if (size != n) throw std::invalid_argument("merge_state: all columns must have one length");
    std::vector<Record> records(n);
    for (std::size_t i = 0; i < n; ++i) records[i] = row_record(rows, i);
    const WriteLock lock(mutex_);
    for (const Record& record : records) {
        const Record* const known = table_.find(record.key);
        if (known != nullptr) check_sum(*known, record);
    }
    for (const Record& record : records) add(record);
}

LedgerRows Ledger::lookup(Span<const std::uint64_t> prompt_ids) const {
    LedgerRows rows;
    reserve(rows, prompt_ids.size);
    const ReadLock lock(mutex_);
    table_.find_each(prompt_ids, [&](std::size_t i, const Record* record) {
        append_row(rows, record == nullptr ? unknown(prompt_ids[i]) : *record);
    });
    return rows;
}

LedgerRows Ledger::export_rows() const {
    const ReadLock lock(mutex_);
    LedgerRows rows;
    reserve(rows, table_.size());
    for (const Record* const record : table_.by_prompt_id()) append_row(rows, *record);
    return rows;
}

double Ledger::posterior_mean(const Record& record, BetaPrior prior, std::int64_t step) const {
    const std::int64_t steps = record.last_step < 0 ? 0 : step - record.last_step;
    if (steps < 0)
        throw std::invalid_argument(message("posterior mean: prompt ", record.prompt_id(), " was last updated at step ",
                                            record.last_step, ", after step=", step,
                                            "; pass a step >= ", record.last_step));
    const double factor = decay_.power(steps);
    const double successes = prior.success + record.decayed_successes * factor;
    return successes / (successes + (prior.failure + record.decayed_failures * factor));
}

std::vector<double> Ledger::posterior_mean(Span<const std::uint64_t> prompt_ids, BetaPrior prior,
                                           std::int64_t step) const {
    check_prior(prior);
    check_step(step);
    std::vector<double> means(prompt_ids.size);
    const ReadLock lock(mutex_);
    table_.find_each(prompt_ids, [&](std::size_t i, const Record* record) {
        means[i] = posterior_mean(record == nullptr ? unknown(prompt_ids[i]) : *record, prior, step);
    });
    return means;
}

void Ledger::visit(const std::function<void(const Record&)>& visitor) const {
    const ReadLock lock(mutex_);
    table_.for_each([&](const Record& record) { visitor(record); });
}

bool Ledger::equals(const Ledger& other) const {
    if (this == &other) return true;
    ReadLock mine(mutex_, std::defer_lock);
    ReadLock theirs(other.mutex_, std::defer_lock);
    std::lock(mine, theirs);
    if (decay() != other.decay() || table_.size() != other.table_.size()) return false;
    bool equal = true;
    table_.for_each([&](const Record& record) {
        const Record* const match = equal ? other.table_.find(record.key) : nullptr;
        equal = match != nullptr && std::memcmp(&record, match, sizeof(Record)) == 0;
    });
    return equal;
}

}  // namespace aer

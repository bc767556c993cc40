#include "aer/ledger.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <unordered_map>
#include <utility>

#include "aer/message.hpp"

namespace aer {
namespace {

using ReadLock = std::shared_lock<std::shared_mutex>;
using WriteLock = std::unique_lock<std::shared_mutex>;

// What is known of a prompt that never came.
Record unknown(std::uint64_t prompt_id) { return {splitmix64(prompt_id), 0.0, 0.0, 0, 0, 0, 0, -1}; }

// Throws for an entry out of range.
void check_entries(const LedgerBatch& batch) {
    const std::size_t n = batch.prompt_ids.size;
    if (batch.attempts.size != n || batch.successes.size != n || batch.entropy_sum.size != n ||
        batch.token_count.size != n)
        throw std::invalid_argument(
            "update: prompt_ids, attempts, successes, entropy_sum and token_count must have one length");
    for (std::size_t i = 0; i < n; ++i) {
        const auto fail = [&](const auto&... what) {
            throw std::invalid_argument(message("update: prompt ", batch.prompt_ids[i], " (index ", i, "): ", what...));
        };
        if (batch.attempts[i] < 0 || batch.attempts[i] > kCountMax)
            fail("attempts=", batch.attempts[i], " must be in [0, ", kCountMax, "]");
        if (batch.successes[i] < 0 || batch.successes[i] > batch.attempts[i])
            fail("successes=", batch.successes[i], " must be in [0, attempts=", batch.attempts[i], "]");
        if (!(batch.entropy_sum[i] >= 0.0 && batch.entropy_sum[i] <= kNatsMax))
            fail("entropy_sum=", batch.entropy_sum[i], " must be in [0, ", kNatsMax, "] nats");
        if (batch.token_count[i] < 0 || batch.token_count[i] > kCountMax)
            fail("token_count=", batch.token_count[i], " must be in [0, ", kCountMax, "]");
    }
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

std::unique_ptr<Ledger> Ledger::copy() const {
    auto made = std::make_unique<Ledger>(decay(), 0);
    const ReadLock lock(mutex_);
    made->table_ = table_;
    return made;
}

// Throws when a prompt of the batch was last updated after `step`, or when its lifetime totals would leave their range.
// That a prompt has room for the whole batch is a bound that almost every batch keeps; only where one has not, the sums
// of single prompts are made. The records of the batch's prompts, nullptr where there is none.
std::vector<const Record*> Ledger::checked_records(const LedgerBatch& batch, std::int64_t step) const {
    std::int64_t attempts = 0, tokens = 0;
    double nats = 0.0;
    for (std::size_t i = 0; i < batch.prompt_ids.size; ++i) {
        attempts += batch.attempts[i];
        tokens += batch.token_count[i];
        nats += batch.entropy_sum[i];
    }
    constexpr Record kNothing{0, 0.0, 0.0, 0, 0, 0, 0, -1};
    std::vector<const Record*> records(batch.prompt_ids.size);
    bool has_room = true;
    table_.find_each(batch.prompt_ids, [&](std::size_t i, const Record* known) {
        records[i] = known;
        const Record& record = known != nullptr ? *known : kNothing;
        if (record.last_step > step)
            throw std::invalid_argument(message("update: prompt ", batch.prompt_ids[i], " was last updated at step ",
                                                record.last_step, "; step=", step,
                                                " would go back; pass a step >= ", record.last_step));
        has_room = has_room && record.attempts + attempts <= kCountMax && record.token_count + tokens <= kCountMax &&
                   static_cast<double>(record.entropy_sum) * kEntropyUnit + nats <= 0.99 * kNatsMax;
    });
    if (!has_room) check_sums(batch);
    return records;
}

void Ledger::check_sums(const LedgerBatch& batch) const {
    std::unordered_map<std::uint64_t, Record> sums;
    for (std::size_t i = 0; i < batch.prompt_ids.size; ++i) {
        const auto fail = [&](const char* what) {
            throw std::invalid_argument(message("update: prompt ", batch.prompt_ids[i], ": its lifetime ", what,
                                                " would leave the ledger's range"));
        };
        const std::uint64_t key = splitmix64(batch.prompt_ids[i]);
        const Record* const known = table_.find(key);
        Record& sum = sums.try_emplace(key, known != nullptr ? *known : unknown(batch.prompt_ids[i])).first->second;
        if (sum.attempts + batch.attempts[i] > kCountMax) fail("attempts");
        if (sum.token_count + batch.token_count[i] > kCountMax) fail("token_count");
        if (sum.entropy_sum > kEntropyMax - entropy_units(batch.entropy_sum[i])) fail("entropy_sum");
        sum.attempts += static_cast<std::uint32_t>(batch.attempts[i]);
        sum.token_count += static_cast<std::uint32_t>(batch.token_count[i]);
        sum.entropy_sum += entropy_units(batch.entropy_sum[i]);
    }
}

void Ledger::update(const LedgerBatch& batch, std::int64_t step) {
    check_step(step);
    check_entries(batch);
    const WriteLock lock(mutex_);
    const std::vector<const Record*> records = checked_records(batch, step);
    const auto add = [&](Record& record, std::size_t i) {
        const double power = decay_.power(step - record.last_step);
        const auto attempts = static_cast<std::uint32_t>(batch.attempts[i]);
        const auto successes = static_cast<std::uint32_t>(batch.successes[i]);
        record.decayed_successes = Decay::decayed(record.decayed_successes, power) + successes;
        record.decayed_failures = Decay::decayed(record.decayed_failures, power) + (attempts - successes);
        record.entropy_sum += entropy_units(batch.entropy_sum[i]);
        record.token_count += static_cast<std::uint32_t>(batch.token_count[i]);
        record.attempts += attempts;
        record.successes += successes;
        record.last_step = static_cast<std::int32_t>(step);
    };
    // known prompts first: an insertion moves records
    for (std::size_t i = 0; i < records.size(); ++i)
        if (records[i] != nullptr) add(table_.writable(records[i]), i);
    for (std::size_t i = 0; i < records.size(); ++i)
        if (records[i] == nullptr) add(table_.find_or_insert(splitmix64(batch.prompt_ids[i]), step), i);
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
    std::vector<std::pair<std::uint64_t, const Record*>> by_prompt_id;
    by_prompt_id.reserve(table_.size());
    table_.for_each([&](const Record& record) { by_prompt_id.emplace_back(record.prompt_id(), &record); });
    std::sort(by_prompt_id.begin(), by_prompt_id.end());
    for (const auto& entry : by_prompt_id) append_row(rows, *entry.second);
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

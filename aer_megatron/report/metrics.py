"""Every metric name of a run, with its unit and meaning: the only file that spells one.

A name is an attribute of ``Metric``, which is a ``str``: ``{Metric.REWARD_MEAN: 0.4}``. Families take a
suffix: ``pass_at("aime24", 8)`` is ``eval/aime24/pass@8``, ``reason_count("no_answer")`` is
``rewards/reason/no_answer``, ``user_number("gate")`` is ``user/gate`` and ``by_difficulty("reward", "hard")`` is
``difficulty/reward/hard``.

Everything that depends on the machine rather than on the seed is under ``time/`` or ``perf/``: drop those keys and two
runs of the same configuration are equal byte for byte.

This file does NOT compute or store values. docs/metrics.md is generated from it
(tools/write_metrics_docs.py).
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from enum import StrEnum

from aer_megatron.algo.flight import BUCKETS

MACHINE_PREFIXES = ("time/", "perf/")

_LABEL = re.compile(r"[a-z][a-z0-9_]*")


class Metric(StrEnum):
    """A metric name with ``unit`` and ``meaning``; unit ``text`` is a string, ``flag`` true or false."""

    unit: str
    meaning: str

    def __new__(cls, name: str, unit: str, meaning: str) -> Metric:
        member = str.__new__(cls, name)
        member._value_ = name
        member.unit = unit
        member.meaning = meaning
        return member

    STEP = "step", "steps", "rollout batches before this one; step 0 is the initial policy"

    REWARD_MEAN = "reward/mean", "reward", "mean reward of the step's rollouts, before any filtering"
    REWARD_SOLVED_ALL = (
        "reward/solved_all",
        "share",
        "groups in which every rollout is right: their advantage is 0",
    )
    REWARD_SOLVED_NONE = (
        "reward/solved_none",
        "share",
        "groups in which no rollout is right: their advantage is 0",
    )

    REWARD_OVERLONG_PENALTY = (
        "reward/overlong_penalty",
        "reward",
        "mean reward that long responses lost, in the advantage alone (overlong_buffer > 0)",
    )

    ENTROPY_TOKEN_MEAN = (
        "entropy/token_mean",
        "nats",
        "H: exact full-vocabulary entropy at the rollout temperature, mean over the step's sampled tokens",
    )
    ENTROPY_INITIAL = "entropy/initial", "nats", "H_0: token_mean of the first step's rollouts; measured once"
    ENTROPY_TARGET = "entropy/target", "nats", "H* = tau * H_0"

    AER_ALPHA = "aer/alpha", "1", "the controller's global coefficient after this step's update"
    AER_COEFFICIENT = "aer/coefficient", "1", "the coefficient that the loss used (0 in shadow mode)"
    AER_DIFFICULTY_MEAN = (
        "aer/difficulty_mean",
        "1",
        "mean over prompts of d(q) before normalisation: 0 easy, 1 hard",
    )
    AER_HELD = (
        "aer/held",
        "flag",
        "alpha kept its last value: the entropy statistic was missing or not finite, or rollout/mismatch_kl too large",
    )
    AER_FROZEN = "aer/frozen", "flag", "the integral was frozen: mean d below its floor (anti-windup)"
    AER_REASON = "aer/reason", "text", "one sentence: what the controller did, and why"
    AER_ALARM = (
        "aer/alarm",
        "text",
        "entropy collapse or explosion, with step, H, H* and alpha; null when all is well",
    )

    LOSS_TOTAL = "loss/total", "nats", "what is minimised: policy loss minus entropy bonus, plus the weighted loss/kl"
    LOSS_POLICY = "loss/policy", "1", "loss of algo.policy_loss, mean by algo.normalizer over the global batch"
    LOSS_KL = (
        "loss/kl",
        "nats",
        "estimate of KL(policy || reference) by algo.kl_estimator, same mean as loss/policy (kl_coefficient > 0)",
    )
    LOSS_ENTROPY_BONUS = (
        "loss/entropy_bonus",
        "nats",
        "alpha * d weighted entropy, same normaliser as loss/policy",
    )
    LOSS_SUPERVISED = "loss/supervised", "nats", "cross-entropy per response token of the supervised stage"

    TRAIN_GRAD_NORM = (
        "train/grad_norm",
        "1",
        "global gradient norm before clipping, mean over the mini-batches",
    )
    TRAIN_UPDATES_SKIPPED = (
        "train/updates_skipped",
        "updates",
        "optimizer updates of the step left out because they were not finite (run.on_nonfinite = skip)",
    )
    TRAIN_LR = "train/lr", "1", "learning rate of the last optimizer step"
    TRAIN_CLIP_LOW = "train/clip_low", "share", "sampled tokens whose ratio was cut below 1 - clip_low"
    TRAIN_CLIP_HIGH = "train/clip_high", "share", "sampled tokens whose ratio was cut above 1 + clip_high"
    TRAIN_APPROX_KL = "train/approx_kl", "nats", "k3 estimate of KL(old || new), mean over sampled tokens"
    TRAIN_COV_SELECTED = "train/cov_selected", "share", "sampled tokens that clip_cov silenced or kl_cov penalised"
    TRAIN_IMPORTANCE_CUT = (
        "train/importance_cut",
        "share",
        "sampled tokens whose importance weight was cut at a bound (algo.correction)",
    )
    TRAIN_IMPORTANCE_REJECTED = (
        "train/importance_rejected",
        "share",
        "sampled tokens without a policy loss: masked, rejected or vetoed by algo.correction",
    )
    TRAIN_IMPORTANCE_SAMPLE_SIZE = (
        "train/importance_sample_size",
        "share",
        "effective sample size of those weights over the tokens: (sum w)^2 / (n sum w^2); 1 = no mismatch",
    )

    ROLLOUT_LOGPROB_DIFF_MAX = (
        "rollout/logprob_diff_max",
        "nats",
        "largest |rollout engine - trainer| log-probability of a sampled token",
    )
    ROLLOUT_LOGPROB_DIFF_MEAN = (
        "rollout/logprob_diff_mean",
        "nats",
        "mean of that difference over sampled tokens",
    )
    ROLLOUT_MISMATCH_KL = (
        "rollout/mismatch_kl",
        "nats",
        "k3 estimate of KL(rollout engine || trainer), mean over sampled tokens",
    )
    ROLLOUT_SAMPLE_SIZE = (
        "rollout/sample_size",
        "share",
        "effective sample size of the train/rollout weights before any cut, (sum w)^2 / (n sum w^2); 1 = no mismatch",
    )
    ROLLOUT_STALENESS_MAX = (
        "rollout/staleness_max",
        "versions",
        "how many policy versions the oldest sampled token is behind the policy that trains on it",
    )
    ROLLOUT_STALENESS_MEAN = "rollout/staleness_mean", "versions", "mean of that over sampled tokens"
    ROLLOUT_RESPONSE_LENGTH_MEAN = "rollout/response_length_mean", "tokens", "mean response length"
    ROLLOUT_TRUNCATED_SHARE = "rollout/truncated_share", "share", "responses cut at rollout.max_new_tokens"
    ROLLOUT_PROMPT_TOKENS = "rollout/prompt_tokens", "tokens", "prompt tokens of the step, once per rollout"
    ROLLOUT_RESPONSE_TOKENS = "rollout/response_tokens", "tokens", "response tokens of the step"
    ROLLOUT_SAMPLED_TOKENS = (
        "rollout/sampled_tokens",
        "tokens",
        "those of them that the policy sampled; absent where it sampled all",
    )
    ROLLOUT_GROUPS_DROPPED = "rollout/groups_dropped", "groups", "groups that dynamic sampling removed"
    ROLLOUT_GROUPS_ABORTED = (
        "rollout/groups_aborted",
        "groups",
        "groups launched beyond those needed and given up, never counted (rollout.oversample > 1)",
    )
    ROLLOUT_REFILLS = "rollout/refills", "rounds", "extra rollout rounds that dynamic sampling took"

    DATA_PROMPTS_SKIPPED = (
        "data/prompts_skipped",
        "prompts",
        "prompts passed over in this step because the ledger knows their outcome (algo.selection.kind = skip_decided)",
    )
    DATA_SKIPPED_RECORDS = (
        "data/skipped_records",
        "records",
        "bad records skipped so far (on_bad_record = skip)",
    )

    CHECKPOINT_FAILED = (
        "checkpoint/failed",
        "checkpoints",
        "checkpoints that this launch could not write so far; it warns and tries again with the next",
    )

    TIME_STEP = "time/step_s", "s", "wall time since the previous line"
    TIME_ROLLOUT = "time/rollout_s", "s", "generation; with rollout.staleness > 0 what training waited for it"
    TIME_REWARD = "time/reward_s", "s", "verification"
    TIME_SCORE = "time/score_s", "s", "forward pass for log-probabilities and entropies"
    TIME_TRAIN = "time/train_s", "s", "forward-backward passes and optimizer steps"
    TIME_SYNC = "time/sync_s", "s", "weights from trainer to rollout engine"
    TIME_EVAL = "time/eval_s", "s", "evaluation; with eval.overlap what training waited for it"
    TIME_CHECKPOINT = "time/checkpoint_s", "s", "what training waited for checkpoints and exports"
    TIME_TOKENS_PER_S = (
        "time/tokens_per_s",
        "tokens/s",
        "the step's tokens over time/step_s, all ranks together",
    )
    TIME_PEAK_RSS_GB = (
        "time/peak_rss_gb",
        "GB",
        "largest resident memory of rank 0 so far (1 GB = 10^9 bytes)",
    )

    PERF_MFU = (
        "perf/mfu",
        "share",
        "operations that the update of the model needs (3 forward passes, nothing computed again) over what the "
        "trainer's GPUs could do in time/train_s by their data sheet (dense bf16); absent on CPU and unknown GPUs",
    )
    PERF_TOKENS_PER_S_PER_GPU = (
        "perf/tokens_per_s_per_gpu",
        "tokens/s",
        "the trained batch's tokens, prompts included, over time/step_s and the trainer's ranks (a rank has one GPU)",
    )
    PERF_ROLLOUT_TOKENS_PER_S = (
        "perf/rollout_tokens_per_s",
        "tokens/s",
        "sampled tokens, those of dropped groups too, over time/rollout_s; with rollout.staleness > 0 over "
        "time/step_s, because generation goes on beside training",
    )
    PERF_IDLE_SHARE = (
        "perf/idle_share",
        "share",
        "part of time/step_s in which the trainer neither scored nor trained: it waited for rollouts, verdicts, "
        "weights, evaluation or a checkpoint",
    )
    PERF_PEAK_MEMORY_GB = (
        "perf/peak_memory_gb",
        "GB",
        "largest device memory that PyTorch had in use on any rank so far (1 GB = 10^9 bytes); absent on CPU",
    )
    PERF_PEAK_MEMORY_OF_PLAN = (
        "perf/peak_memory_of_plan",
        "share",
        "perf/peak_memory_gb over what aer plan gives the run file's layout on its fullest rank; absent on CPU",
    )


@dataclass(frozen=True, slots=True)
class Family:
    """Names that share a prefix: ``prefix`` followed by what ``suffix`` matches."""

    prefix: str
    suffix: re.Pattern[str]
    placeholder: str
    unit: str
    meaning: str

    def matches(self, name: str) -> bool:
        return name.startswith(self.prefix) and bool(self.suffix.fullmatch(name.removeprefix(self.prefix)))


# NAME is the name of a set of [eval.sets]; absent at steps without its evaluation
_OF_SET = {
    "pass@K": ("share", "unbiased pass@k of an evaluation set: right at least once in k samples, mean over problems"),
    "pass@K_low": ("share", "lower end of its 95 % interval over problems"),
    "pass@K_high": ("share", "upper end of its 95 % interval over problems"),
    "avg@K": ("reward", "mean reward of the set's K samples per problem"),
    "maj@K": (
        "share",
        "the most frequent answer of k samples is right, mean over problems; where the verifier tells answers apart",
    ),
    "response_length_mean": ("tokens", "mean response length of the set's samples"),
    "truncated": ("share", "samples of the set that were cut at max_new_tokens"),
}
EVALUATION = {
    measure: Family(
        "eval/",
        re.compile(rf"{_LABEL.pattern}/{measure.replace('K', r'[1-9][0-9]*')}"),
        f"NAME/{measure}",
        unit,
        meaning,
    )
    for measure, (unit, meaning) in _OF_SET.items()
}
_PASS = re.compile(rf"eval/({_LABEL.pattern})/pass@([1-9][0-9]*)")
REASON = Family("rewards/reason/", _LABEL, "LABEL", "rollouts", "rollouts whose verdict carries this reason")

# BUCKET is one of algo.flight.BUCKETS, by g, the share of a prompt's own rollouts that are right in this step
_BY_DIFFICULTY = {
    "prompts": (
        "prompts",
        "prompts of the trained batch that are unsolved (g = 0), hard (0 < g <= 1/3), medium, or easy (g >= 2/3); "
        "g is the share of right rollouts. The other difficulty/* are of these prompts, absent where there are none",
    ),
    "tokens": ("tokens", "sampled tokens of these prompts: the count behind difficulty/token_entropy"),
    "token_entropy": ("nats", "token_entropy of these prompts, mean over their sampled tokens"),
    "reward": ("reward", "mean reward of the rollouts of these prompts"),
    "response_length": ("tokens", "mean number of sampled tokens of a response to these prompts"),
    "coefficient": ("1", "coefficient * d that the loss used, mean over these prompts"),
}
DIFFICULTY = {
    measure: Family(f"difficulty/{measure}/", re.compile("|".join(BUCKETS)), "BUCKET", unit, meaning)
    for measure, (unit, meaning) in _BY_DIFFICULTY.items()
}
USER = Family("user/", _LABEL, "NAME", "1", "mean of a number that a rule of the run's own reports under this name")
FAMILIES = (*EVALUATION.values(), REASON, USER, *DIFFICULTY.values())


def of_set(name: str, measure: str, k: int | None = None) -> str:
    """Returns the name of a measure of evaluation set ``name``, ``K`` in it being ``k``.

    Example: ``of_set("aime24", "pass@K_low", 8) == "eval/aime24/pass@8_low"``

    Raises:
        ValueError: there is no such measure, or ``k`` is below 1.
    """
    if measure not in EVALUATION or (k is None) == ("K" in measure) or (k is not None and k < 1):
        raise ValueError(f"measure {measure!r} with k={k} is none of an evaluation set; use {', '.join(EVALUATION)}")
    return f"eval/{name}/{measure.replace('K', str(k))}"


def pass_at(name: str, k: int) -> str:
    """Returns the name of pass@k of evaluation set ``name``, for example ``eval/aime24/pass@8``."""
    return of_set(name, "pass@K", k)


def reason_count(label: str) -> str:
    """Returns the name that counts verdicts with reason ``label``, for example ``rewards/reason/no_answer``.

    Raises:
        ValueError: ``label`` is not a snake_case label.
    """
    if not _LABEL.fullmatch(label):
        raise ValueError(f"verdict reason {label!r} must be a snake_case label such as no_answer; rename it")
    return f"{REASON.prefix}{label}"


def user_number(name: str) -> str:
    """Returns the name of what a run's own rule reports as ``name``, for example ``user/gate``."""
    return f"{USER.prefix}{name}"


def by_difficulty(measure: str, bucket: str) -> str:
    """Returns the name of a measure of one difficulty bucket, for example ``difficulty/reward/hard``.

    Raises:
        ValueError: no such measure or bucket.
    """
    if measure not in DIFFICULTY or bucket not in BUCKETS:
        raise ValueError(
            f"{measure!r} of bucket {bucket!r} is no metric; measures: {', '.join(DIFFICULTY)}; buckets: "
            f"{', '.join(BUCKETS)}"
        )
    return f"{DIFFICULTY[measure].prefix}{bucket}"


def pass_k(name: str) -> tuple[str, int] | None:
    """Returns (set, k) of the metric ``eval/NAME/pass@k``, None for any other name."""
    found = _PASS.fullmatch(name)
    return (found[1], int(found[2])) if found else None


def unit_of(name: str) -> str:
    """Returns the unit of a metric.

    Raises:
        ValueError: no such metric; the message names the nearest one.
    """
    if name in _UNITS:
        return _UNITS[name]
    for family in FAMILIES:
        if family.matches(name):
            return family.unit
    known = [*_UNITS, *(family.prefix + family.placeholder for family in FAMILIES)]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    raise ValueError(f"unknown metric {name!r}: nearest is {near[0]!r}; new names go into report/metrics.py")


_UNITS = {str(metric): metric.unit for metric in Metric}

"""The metrics of one training step: its rollouts, what the loss reported, what the controller saw and did.

This file does NOT spell metric names (metrics.py) or reduce over ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aer_megatron.algo.advantage import AdvantageResult
from aer_megatron.algo.controller import Decision, Observation
from aer_megatron.algo.experience import Staleness
from aer_megatron.algo.flight import BatchProfile, bucket_means
from aer_megatron.algo.mismatch import Mismatch
from aer_megatron.report.metrics import Metric, by_difficulty, user_number
from aer_megatron.types import Experience, StepStats


def training_metrics(stats: StepStats, *, kl_coefficient: float) -> dict[str, float]:
    """Returns loss, clip and importance metrics of one step; a rule that is off has no entry."""
    policy_loss, bonus = stats.mean("policy_loss"), stats.mean("entropy_bonus")
    metrics: dict[str, float] = {
        Metric.LOSS_TOTAL: policy_loss - bonus,
        Metric.LOSS_POLICY: policy_loss,
        Metric.LOSS_ENTROPY_BONUS: bonus,
        Metric.TRAIN_GRAD_NORM: stats.grad_norm,
        Metric.TRAIN_LR: stats.learning_rate,
        Metric.TRAIN_CLIP_LOW: stats.mean("clip_low"),
        Metric.TRAIN_CLIP_HIGH: stats.mean("clip_high"),
        Metric.TRAIN_APPROX_KL: stats.mean("approx_kl"),
    }
    if "reference_kl" in stats.sums:
        metrics[Metric.LOSS_KL] = stats.mean("reference_kl")
        metrics[Metric.LOSS_TOTAL] += kl_coefficient * stats.mean("reference_kl")
    if "selected" in stats.sums:
        metrics[Metric.TRAIN_COV_SELECTED] = stats.mean("selected")
    if "importance_weight" in stats.sums:
        metrics[Metric.TRAIN_IMPORTANCE_CUT] = stats.mean("importance_cut")
        metrics[Metric.TRAIN_IMPORTANCE_REJECTED] = stats.mean("importance_rejected")
        # (sum w)^2 / (n sum w^2): 1 for equal weights, 1/n where one token has all of it, 0 where none has any
        weight, squared = stats.mean("importance_weight"), stats.mean("importance_weight_squared")
        metrics[Metric.TRAIN_IMPORTANCE_SAMPLE_SIZE] = weight**2 / squared if squared else 0.0
    return metrics


def user_metrics(names: Sequence[str], sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Returns the means of ``names``, what a run's own rules report, as far as ``sums`` has them."""
    found = {name: sums[name] for name in names if name in sums}
    return {user_number(name): total / count for name, (total, count) in found.items() if count}


def controller_metrics(decision: Decision, observation: Observation, advantages: AdvantageResult) -> dict[str, Any]:
    """Returns entropy and target, what the controller did, and the groups without an advantage."""
    counts_P, successes_P = advantages.counts_P, advantages.successes_P
    return {
        Metric.REWARD_SOLVED_ALL: float((successes_P == counts_P).mean()),
        Metric.REWARD_SOLVED_NONE: float((successes_P == 0).mean()),
        Metric.ENTROPY_TOKEN_MEAN: observation.token_mean,
        Metric.ENTROPY_INITIAL: decision.state.initial_entropy,
        Metric.ENTROPY_TARGET: decision.target,
        Metric.AER_ALPHA: decision.state.alpha,
        Metric.AER_DIFFICULTY_MEAN: observation.difficulty_mean,
        Metric.AER_HELD: decision.held,
        Metric.AER_FROZEN: decision.frozen,
        Metric.AER_REASON: decision.reason,
        Metric.AER_ALARM: decision.alarm,
    }


def difficulty_metrics(profile: BatchProfile, coefficient: float) -> dict[str, Any]:
    """Returns the metrics of the difficulty buckets that are not empty."""
    means = bucket_means(profile.buckets, coefficient)
    return {by_difficulty(name, bucket): value for bucket, row in means.items() for name, value in row.items()}


def experience_metrics(experience: Experience) -> dict[str, float]:
    """Returns lengths and token counts of the rollout batch."""
    metrics: dict[str, float] = {
        Metric.ROLLOUT_RESPONSE_LENGTH_MEAN: float(experience.response_length_B.mean()),
        Metric.ROLLOUT_TRUNCATED_SHARE: float(experience.truncated_B.mean()),
        Metric.ROLLOUT_PROMPT_TOKENS: int(experience.prompt_length_B.sum()),
        Metric.ROLLOUT_RESPONSE_TOKENS: int(experience.response_length_B.sum()),
    }
    if experience.sampled_L is not None:
        metrics[Metric.ROLLOUT_SAMPLED_TOKENS] = experience.num_sampled_tokens
    return metrics


def engine_metrics(mismatch: Mismatch, staleness: Staleness) -> dict[str, float]:
    """Returns how far the policy that sampled is from the one that trains: in log-probabilities and in versions."""
    return {
        Metric.ROLLOUT_LOGPROB_DIFF_MAX: mismatch.largest,
        Metric.ROLLOUT_LOGPROB_DIFF_MEAN: mismatch.difference_mean,
        Metric.ROLLOUT_MISMATCH_KL: mismatch.kl,
        Metric.ROLLOUT_SAMPLE_SIZE: mismatch.sample_size,
        Metric.ROLLOUT_STALENESS_MAX: staleness.largest,
        Metric.ROLLOUT_STALENESS_MEAN: staleness.mean,
    }

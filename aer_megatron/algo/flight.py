"""What a step leaves in the flight recorder, and the replay of any controller on what was left.

    Experience, PolicyScores, advantages --profile_batch--> BatchProfile (sums by difficulty, histograms, gradients)
    FlightRecord of every step --replay--> what another controller would have done with the same observations

Shape suffixes: P prompts, B sequences, T packed sampled tokens, D difficulty buckets, K entropy bins, Q position bins,
I any of P, B and T.

Difficulty buckets are cut by g, the share of a prompt's own group that is right in this step (``BUCKETS``):
unsolved g = 0, hard 0 < g <= 1/3, medium 1/3 < g < 2/3, easy g >= 2/3.

This file does NOT reduce over ranks, write files or draw.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aer_megatron.algo import controller
from aer_megatron.algo.advantage import AdvantageResult
from aer_megatron.algo.controller import ControllerState, Decision, Observation
from aer_megatron.algo.difficulty import difficulty
from aer_megatron.algo.entropy_rules.base import EntropyRule
from aer_megatron.types import Experience, Float32Array, Float64Array, Int64Array, PolicyScores

BUCKETS = ("unsolved", "hard", "medium", "easy")

# Bin k of an entropy histogram is [edge k, edge k + 1) in nats: one bin for nearly certain tokens, then half octaves.
ENTROPY_EDGES = (0.0, *(2.0 ** (k / 2) for k in range(-20, 9)))


@dataclass(frozen=True, slots=True)
class BucketSums:
    """Sums over the prompts of each difficulty bucket, in the order of ``BUCKETS``; never means.

    Example, one prompt with 1 of 4 rollouts right and 20 tokens: ``prompts_D=[0, 1, 0, 0], rollouts_D=[0, 4, 0, 0],
    tokens_D=[0, 20, 0, 0], entropy_sum_D=[0, 9.5, 0, 0], reward_sum_D=[0, 1, 0, 0], allocation_sum_D=[0, 0.5, 0, 0]``.
    """

    prompts_D: Int64Array
    rollouts_D: Int64Array
    tokens_D: Int64Array
    entropy_sum_D: Float64Array  # nats
    reward_sum_D: Float64Array
    allocation_sum_D: Float64Array  # of the prompts' d as the loss uses it: times the coefficient


@dataclass(frozen=True, slots=True)
class GradientGeometry:
    """Norms in x = logits / T of a step's policy gradient and of its entropy gradient per unit of coefficient.

    ``cosine`` is that of the ascent directions: below 0 the policy gradient lowers the entropy that the bonus raises.
    It is None where either gradient is zero.
    """

    policy_norm: float
    entropy_norm: float
    cosine: float | None


@dataclass(frozen=True, slots=True)
class BatchProfile:
    """What a rollout batch looks like before its update: sums by difficulty, entropy histograms, gradients.

    ``entropy_by_position_QK[q]`` counts tokens by entropy, those that were sampled as number 2^q - 1 to 2^(q+1) - 2
    (0, 1-2, 3-6, ...) of their response; there are as many rows as the longest response needs.
    """

    buckets: BucketSums
    entropy_by_difficulty_DK: Int64Array
    entropy_by_position_QK: Int64Array
    gradients: GradientGeometry | None  # None where the scores carry no gradient statistics


@dataclass(frozen=True, slots=True)
class FlightRecord:
    """One step: exactly what the controller saw, what it answered, and what the batch looked like.

    ``ledger_accuracy_P`` is the ledger's posterior mean after this step's evidence, so that either difficulty source
    can be replayed; the group's accuracy is ``successes_P / counts_P``. Clip counts are (tokens, of tokens).
    """

    step: int
    observation: Observation
    state: ControllerState  # after the update
    coefficient: float  # what the loss used
    successes_P: Int64Array
    counts_P: Int64Array
    ledger_accuracy_P: Float64Array
    profile: BatchProfile
    clip_low: tuple[float, float]
    clip_high: tuple[float, float]


@dataclass(frozen=True, slots=True)
class ReplayedStep:
    """What a controller would have answered to the recorded observation of one step."""

    step: int
    observation: Observation  # with the mean difficulty of the replayed options
    decision: Decision


def difficulty_buckets(successes_P: Int64Array, counts_P: Int64Array) -> Int64Array:
    """Returns each prompt's index in ``BUCKETS``, int64 [P]; compared in integers, so g = 1/3 and 2/3 are exact.

    Raises:
        ValueError: shapes differ, or a count is not positive or smaller than its successes.
    """
    if successes_P.shape != counts_P.shape or np.any((counts_P < 1) | (successes_P < 0) | (successes_P > counts_P)):
        raise ValueError(f"successes_P={successes_P} must lie in 0..counts_P={counts_P}, with counts of at least 1")
    return (successes_P > 0).astype(np.int64) + (3 * successes_P > counts_P) + (3 * successes_P >= 2 * counts_P)


def profile_batch(
    experience: Experience, scores: PolicyScores, advantages: AdvantageResult, allocation_P: Float64Array
) -> BatchProfile:
    """Returns the profile of a rollout batch; the same on every rank, because its inputs are.

    Args:
        allocation_P: difficulty after normalisation: w_t of a token is its prompt's, per unit of coefficient.
    """
    # sums by difficulty, over prompts (P), rollouts (B) and sampled tokens (T)
    bucket_P = difficulty_buckets(advantages.successes_P, advantages.counts_P)
    bucket_B = bucket_P[experience.group_index_B]
    length_B = experience.sampled_length_B
    bucket_T = np.repeat(bucket_B, length_B)
    entropy_T = scores.token_entropy_T
    num = len(BUCKETS)
    buckets = BucketSums(
        prompts_D=np.bincount(bucket_P, minlength=num),
        rollouts_D=np.bincount(bucket_B, minlength=num),
        tokens_D=np.bincount(bucket_T, minlength=num),
        entropy_sum_D=_bucket_sum(bucket_T, entropy_T),
        reward_sum_D=_bucket_sum(bucket_B, experience.reward_B),
        allocation_sum_D=_bucket_sum(bucket_P, allocation_P),
    )
    # a token's position in its response
    position_T = np.arange(len(entropy_T)) - np.repeat(np.cumsum(length_B) - length_B, length_B)
    return BatchProfile(
        buckets=buckets,
        entropy_by_difficulty_DK=entropy_histogram_rows(entropy_T, bucket_T, num_rows=num),
        entropy_by_position_QK=entropy_histogram_rows(
            entropy_T, position_bins(position_T), num_rows=int(length_B.max(initial=0)).bit_length()
        ),
        gradients=gradient_geometry(
            scores,
            advantage_T=np.repeat(advantages.advantage_B, length_B),
            weight_T=np.repeat(allocation_P[experience.group_index_B], length_B),
        ),
    )


def bucket_means(sums: BucketSums, coefficient: float) -> dict[str, dict[str, float]]:
    """Returns, for every bucket that holds a prompt, its size and its means by measure (report/metrics.py lists them).

    ``coefficient`` times the mean of d is what the loss used on average over the bucket's prompts. A bucket without
    tokens has no mean entropy.
    """
    means = {}
    for index, name in enumerate(BUCKETS):
        prompts, rollouts, tokens = (int(n[index]) for n in (sums.prompts_D, sums.rollouts_D, sums.tokens_D))
        if not prompts:
            continue
        means[name] = {
            "prompts": prompts,
            "tokens": tokens,
            "reward": float(sums.reward_sum_D[index]) / rollouts,
            "response_length": tokens / rollouts,
            "coefficient": coefficient * float(sums.allocation_sum_D[index]) / prompts,
        } | ({"token_entropy": float(sums.entropy_sum_D[index]) / tokens} if tokens else {})
    return means


def _bucket_sum(bucket_I: Int64Array, value_I: NDArray[np.floating[Any]]) -> Float64Array:
    return np.bincount(bucket_I, weights=value_I, minlength=len(BUCKETS)).astype(np.float64)


def position_bins(position_T: NDArray[np.int64]) -> Int64Array:
    """Returns floor(log2(position + 1)) of token positions counted from 0, int64 [T], exact below 2^53."""
    # frexp gives x = mantissa * 2^exponent with a mantissa in [1/2, 1): no logarithm to round the wrong way
    return np.frexp(position_T + 1)[1].astype(np.int64) - 1


def entropy_histogram_rows(entropy_T: Float32Array, row_T: NDArray[np.int64], *, num_rows: int) -> Int64Array:
    """Returns how many tokens of each row fall into each bin of ``ENTROPY_EDGES``, int64 [num_rows, K].

    Entropies outside the edges are counted in the nearest bin (rounding may leave one a little below 0), NaN in the
    last one: a broken batch must not break its own record.
    """
    num_bins = len(ENTROPY_EDGES) - 1
    bin_T = np.searchsorted(np.array(ENTROPY_EDGES[1:-1]), entropy_T, side="right")
    flat = np.bincount(row_T * num_bins + bin_T, minlength=num_rows * num_bins)
    return flat.reshape(num_rows, num_bins)


def gradient_geometry(
    scores: PolicyScores, *, advantage_T: Float64Array, weight_T: Float64Array
) -> GradientGeometry | None:
    """Returns norms and cosine of g_P = sum_t (A_t / N) d logprob_t / dx and g_H = sum_t (w_t / N) d H_t / dx.

    x = logits / T_rollout, N = T the sampled tokens of the batch, ratio 1: the gradients at the start of the step,
    before any clipping. Different tokens have different logits, so squares and products add over the tokens:
    |g_P|^2 = sum (A_t / N)^2 |d logprob_t / dx|^2, and so on. None where the scores carry no gradient statistics.
    """
    logprob_sq, entropy_sq, dot = scores.logprob_grad_sq_T, scores.entropy_grad_sq_T, scores.grad_dot_T
    if logprob_sq is None or entropy_sq is None or dot is None:
        return None
    num_tokens = max(1, len(advantage_T))
    a_T, w_T = advantage_T / num_tokens, weight_T / num_tokens
    policy = math.sqrt(float((a_T * a_T * logprob_sq).sum()))
    entropy = math.sqrt(float((w_T * w_T * entropy_sq).sum()))
    product = float((a_T * w_T * dot).sum())
    defined = policy > 0 and entropy > 0
    cosine = min(1.0, max(-1.0, product / policy / entropy)) if defined else None
    return GradientGeometry(policy_norm=policy, entropy_norm=entropy, cosine=cosine)


def replay(records: Sequence[FlightRecord], rule: EntropyRule, *, recorded: EntropyRule) -> list[ReplayedStep]:
    """Returns what a controller with ``rule`` would have done at every step. OPEN LOOP: H stays the recorded one.

    With the run's own rule the recorded states come back bit for bit. A recording that begins after
    step 0 gives its first state as the start, and its first step is not replayed.

    Args:
        records: consecutive steps.
        recorded: the rule of the run: where the options that make d are the same, the recorded mean is taken as it is.

    Raises:
        ValueError: steps are missing between two records, or nothing is left to replay.
    """
    for before, after in itertools.pairwise(records):
        if after.step != before.step + 1:
            raise ValueError(f"the recording lacks the steps between {before.step} and {after.step}; replay one part")
    if len(records) < 2 and (not records or records[0].step > 0):
        raise ValueError("the recording holds no step to replay; record at least one step from step 0, or two later")
    first = records[0]
    state = controller.initial_state(rule) if first.step == 0 else first.state
    same_difficulty = _difficulty_options(rule) == _difficulty_options(recorded)
    steps = []
    for record in records if first.step == 0 else records[1:]:
        observation = record.observation
        if not same_difficulty:
            observation = replace(observation, difficulty_mean=float(replayed_difficulty(record, rule).mean()))
        decision = controller.step(state, rule, observation)
        state = decision.state
        steps.append(ReplayedStep(record.step, observation, decision))
    return steps


def replayed_difficulty(record: FlightRecord, rule: EntropyRule) -> Float64Array:
    """Returns d(q) of a recorded step under ``rule``, before normalisation, float64 [P]."""
    accuracy_P = record.ledger_accuracy_P if rule.source == "ledger" else record.successes_P / record.counts_P
    return difficulty(accuracy_P, shape=rule.difficulty, rho=rule.rho)


def _difficulty_options(rule: EntropyRule) -> tuple[Any, ...]:
    return rule.difficulty, rule.rho, rule.source

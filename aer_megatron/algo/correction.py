"""Correction for rollouts that another policy sampled: the engine's kernels, its precision, an older version.

With the gap x_t = log pi_old(token) - log pi_rollout(token), pi_old the trainer at the start of the step:

    weight   exp(x_t) of the token, exp(sum) of its sequence or exp(mean); truncated at two bounds, or 0 outside them
    reject   0 outside two bounds of the same three ratios, 1 inside
    veto     0 for a sequence with one token whose exp(x_t) is below it

The weight multiplies the policy's term alone: KL and entropy of rejected tokens stay, unless they leave the
denominator. Truncation by token: Yao et al. 2025; masks, geometric mean and veto: Liu et al. 2025. The product over a
sequence is the unbiased weight; the geometric mean is none, but a test that length does not bend.

Shape suffixes: T packed sampled tokens, B sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aer_megatron.algo.options import CorrectionSection
from aer_megatron.types import BoolArray, Float64Array, Int64Array

_MAX_LOG_RATIO = 20.0  # as in algo/loss.py


@dataclass(frozen=True, slots=True)
class Correction:
    """What multiplies each token's policy loss, and which tokens the loss is a mean over."""

    weight_T: Float64Array
    counted_T: BoolArray
    counted_length_B: Int64Array  # tokens of each sequence that are counted


def correction(
    old_logprob_T: NDArray[np.floating],
    rollout_logprob_T: NDArray[np.floating],
    sampled_length_B: Int64Array,
    options: CorrectionSection,
) -> Correction | None:
    """Returns the correction of a batch, None where ``options`` has none.

    Args:
        old_logprob_T: log pi(token) in nats by the trainer at the start of the step.
        rollout_logprob_T: the same by the policy that sampled it, as the engine reported it.
        sampled_length_B: sampled tokens of each sequence; they add up to T.
    """
    if not options.is_on:
        return None
    num_sequences = len(sampled_length_B)
    sequence_T = np.repeat(np.arange(num_sequences), sampled_length_B)
    gap_T = old_logprob_T.astype(np.float64) - rollout_logprob_T
    weight_T = np.ones_like(gap_T)
    if options.weight != "none":
        ratio_T = _ratio(gap_T, sequence_T, sampled_length_B, options.weight)
        if options.bound == "truncate":
            weight_T = ratio_T.clip(options.low, options.high or None)
        else:
            weight_T = np.where(_within(ratio_T, options.low, options.high), ratio_T, 0.0)
    if options.reject != "none":
        ratio_T = _ratio(gap_T, sequence_T, sampled_length_B, options.reject)
        weight_T = np.where(_within(ratio_T, options.reject_low, options.reject_high), weight_T, 0.0)
    if options.veto:
        vetoed_B = np.bincount(sequence_T, gap_T < np.log(options.veto), minlength=num_sequences) > 0
        weight_T = np.where(vetoed_B[sequence_T], 0.0, weight_T)
    counted_T = weight_T > 0 if options.denominator == "kept" else np.ones_like(weight_T, dtype=np.bool_)
    return Correction(weight_T, counted_T, np.bincount(sequence_T[counted_T], minlength=num_sequences))


def _ratio(gap_T: Float64Array, sequence_T: Int64Array, sampled_length_B: Int64Array, level: str) -> Float64Array:
    """Returns exp of the gap of each token, of its sequence's sum or mean."""
    if level != "token":
        sum_B = np.bincount(sequence_T, gap_T, minlength=len(sampled_length_B)).astype(np.float64)
        gap_T = (sum_B if level == "sequence" else sum_B / np.maximum(sampled_length_B, 1))[sequence_T]
    ratio_T: Float64Array = np.exp(gap_T.clip(-_MAX_LOG_RATIO, _MAX_LOG_RATIO))
    return ratio_T


def _within(ratio_T: Float64Array, low: float, high: float) -> BoolArray:
    """Returns which ratios lie within the bounds, both inclusive; ``high`` = 0 is none."""
    within_T: BoolArray = (ratio_T >= low) & (ratio_T <= (high or np.inf))
    return within_T

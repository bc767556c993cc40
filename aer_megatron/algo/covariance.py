"""What Clip-Cov and KL-Cov pick their tokens by, from the whole mini-batch of an optimizer step.

Both rules (Cui et al., arXiv 2505.22617) start from the share of each token in the covariance of advantage and
log-probability, C_t = (A_t - mean A) (logp_t - mean logp), which is what drives entropy down. The means and the ranking
are those of ALL sampled tokens of the mini-batch, so the arrays here are the gathered ones: computed on a micro-batch
or on one rank's share, the same formulas would pick other tokens for every split.

What is left of the split is rounding: log-probabilities of two layouts differ by about 1e-7, so a token that lies
within that of a threshold, or two tokens that are as close to one another, may be picked under one layout and not under
the other. All ranks of one run see the same bits and always agree.

Shape suffix: T sampled tokens of the mini-batch, in the order of the rollout batch.

This file does NOT touch torch, ranks or losses.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from aer_megatron.types import BoolArray, Float64Array


def token_covariance(advantage_T: NDArray[np.floating], logprob_T: NDArray[np.floating]) -> Float64Array:
    """Returns C_t = (A_t - mean A) (logp_t - mean logp), float64 [T]; its mean is the covariance of the batch."""
    advantage = advantage_T.astype(np.float64)
    logprob = logprob_T.astype(np.float64)
    if not len(advantage):
        return advantage
    covariance_T: Float64Array = (advantage - advantage.mean()) * (logprob - logprob.mean())
    return covariance_T


def highest_covariance(covariance_T: Float64Array, *, fraction: float) -> BoolArray:
    """Returns bool [T]: the max(1, floor(fraction T)) tokens of the highest C_t; of equals the earlier ones."""
    order_T = np.argsort(-covariance_T, kind="stable")
    return _first(order_T, token_quota(len(covariance_T), fraction))


def random_subset(candidate_T: BoolArray, *, fraction: float, key: tuple[int, int]) -> BoolArray:
    """Returns bool [T]: max(1, floor(fraction T)) random candidates, or all of them where there are fewer.

    Every token, candidate or not, draws its own number by its place, and the candidates with the smallest numbers are
    taken: one candidate more or less moves at most one pick.
    """
    draw_T = np.random.Generator(np.random.Philox(key=np.array(key, dtype=np.uint64))).random(len(candidate_T))
    order_T = np.argsort(np.where(candidate_T, draw_T, np.inf), kind="stable")
    return _first(order_T, min(token_quota(len(candidate_T), fraction), int(candidate_T.sum())))


def token_quota(num_tokens: int, fraction: float) -> int:
    """Returns max(1, floor(fraction num_tokens)), 0 without tokens; 0.29 * 100 is 29 whatever binary makes of it."""
    return min(num_tokens, max(1, math.floor(round(fraction * num_tokens, 9))))


def _first(order_T: NDArray[np.intp], count: int) -> BoolArray:
    selected_T = np.zeros(len(order_T), dtype=np.bool_)
    selected_T[order_T[:count]] = True
    return selected_T

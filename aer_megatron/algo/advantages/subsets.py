"""Maxima over the k-subsets of a group's rewards, in closed form: no subset is listed.

Shape suffix: n rollouts of one group.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from aer_megatron.types import Float64Array, Int64Array


def of_groups(
    reward_B: Float64Array, group_index_B: Int64Array, advantages: Callable[[Float64Array], Float64Array]
) -> Float64Array:
    """Returns ``advantages`` of each group's rewards [n], float64 [B]; 0 for a rollout alone in its group."""
    result_B = np.zeros_like(reward_B)
    for group in range(int(group_index_B.max(initial=-1)) + 1):
        member_B = group_index_B == group
        if member_B.sum() > 1:
            result_B[member_B] = advantages(reward_B[member_B])
    return result_B


def rank_weights(n: int, k: int) -> Float64Array:
    """Returns the share of the k-subsets of n sorted values whose maximum is the i-th smallest, float64 [n].

    C(i, k - 1) / C(n, k) for i = 0..n-1. Raises ValueError unless 1 <= k <= n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"k={k} must be from 1 to the number of values, {n}")
    total = math.comb(n, k)
    return np.array([math.comb(i, k - 1) / total for i in range(n)])


def mean_maximum(value_n: Float64Array, k: int) -> float:
    """Returns the mean over all k-subsets of their largest value; 0 for k = 0."""
    return float(np.sort(value_n) @ rank_weights(len(value_n), k)) if k else 0.0


def mean_maximum_with(value_n: Float64Array, k: int) -> Float64Array:
    """Returns for each value the mean over the k-subsets that it is in of their largest value, float64 [n]."""
    n = len(value_n)
    order = np.argsort(value_n, kind="stable")
    sorted_n = value_n[order]
    # of the C(n-1, k-1) subsets with i: i is the largest of C(i, k-1) of them, a larger j of C(j-1, k-2)
    own_n = np.array([math.comb(i, k - 1) for i in range(n)], dtype=np.float64)
    other_n = np.array([math.comb(j - 1, k - 2) if min(j - 1, k - 2) >= 0 else 0 for j in range(n)], dtype=np.float64)
    above_n = np.cumsum((other_n * sorted_n)[::-1])[::-1] - other_n * sorted_n
    result_n = np.empty(n)
    result_n[order] = (own_n * sorted_n + above_n) / math.comb(n - 1, k - 1)
    return result_n


def mean_maximum_without(value_n: Float64Array, k: int) -> Float64Array:
    """Returns for each value the mean over the k-subsets of the others of their largest value, float64 [n]."""
    return np.array([mean_maximum(np.delete(value_n, i), k) for i in range(len(value_n))])

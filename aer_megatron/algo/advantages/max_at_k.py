"""Advantages for the best of k rollouts: PKPO (arXiv 2505.15201) and pass@k training (arXiv 2508.10751)."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from aer_megatron.algo.advantages.base import Advantage
from aer_megatron.algo.advantages.subsets import mean_maximum_with, mean_maximum_without, of_groups, rank_weights
from aer_megatron.types import Float64Array, Int64Array


class MaxAtK(Advantage):
    """A_i = k (mean of max S over the k-subsets S with i, minus a baseline without i); unbiased for max@k.

    The paper's s_i are weights of a sum over the n rollouts; these are n s_i, as the loss is a mean, so that k = 1 with
    ``loo`` is RLOO. k is cut to what a group has. A rollout alone in its group gets 0.
    """

    kind: Literal["max_at_k"] = "max_at_k"
    min_group_size: ClassVar[int] = 2
    k: int = Field(4, ge=1, description="rollouts of which the best counts")
    baseline: Literal["none", "loo", "loo_minus_one"] = Field(
        "loo_minus_one",
        description="what is subtracted: nothing; the mean maximum of k others; that of the k - 1 others of the subset",
    )

    def advantages(
        self, reward_B: Float64Array, group_index_B: Int64Array
    ) -> tuple[Float64Array, dict[str, tuple[float, float]]]:
        return of_groups(reward_B, group_index_B, self._of_group), {}

    def _of_group(self, reward_n: Float64Array) -> Float64Array:
        n = len(reward_n)
        if self.baseline == "none":
            k = min(self.k, n)
            return k * mean_maximum_with(reward_n, k)
        if self.baseline == "loo" or self.k == 1:
            k = min(self.k, n - 1)
            return k * (mean_maximum_with(reward_n, k) - mean_maximum_without(reward_n, k))
        k = min(self.k, n)
        return k * (mean_maximum_with(reward_n, k) - mean_maximum_without(reward_n, k - 1))


class PassAtK(Advantage):
    """A_i = (mean of max S over the k-subsets S with i, minus the mean over all of them) / their standard deviation.

    The paper's closed form for rewards 0 and 1, for any rewards. The deviation of the same rollouts makes it biased.
    """

    kind: Literal["pass_at_k"] = "pass_at_k"
    min_group_size: ClassVar[int] = 2
    k: int = Field(4, ge=1, description="rollouts of which one must be right")

    def advantages(
        self, reward_B: Float64Array, group_index_B: Int64Array
    ) -> tuple[Float64Array, dict[str, tuple[float, float]]]:
        return of_groups(reward_B, group_index_B, self._of_group), {}

    def _of_group(self, reward_n: Float64Array) -> Float64Array:
        k = min(self.k, len(reward_n))
        weight_n, largest_n = rank_weights(len(reward_n), k), np.sort(reward_n)
        mean = weight_n @ largest_n
        variance = weight_n @ (largest_n - mean) ** 2
        if not variance > 1e-24 * (1 + mean * mean):  # one value, up to rounding
            return np.zeros_like(reward_n)
        advantage_n: Float64Array = (mean_maximum_with(reward_n, k) - mean) / np.sqrt(variance)
        return advantage_n

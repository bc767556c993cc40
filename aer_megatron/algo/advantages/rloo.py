"""RLOO's advantage (arXiv 2402.14740): the reward minus the mean reward of the prompt's other rollouts."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from aer_megatron import _C
from aer_megatron.algo.advantages.base import Advantage
from aer_megatron.types import Float64Array, Int64Array


class Rloo(Advantage):
    """A = R - mean of the others = n / (n - 1) (R - mean of all n); 0 for a rollout alone."""

    kind: Literal["rloo"] = "rloo"
    min_group_size: ClassVar[int] = 2

    def advantages(
        self, reward_B: Float64Array, group_index_B: Int64Array
    ) -> tuple[Float64Array, dict[str, tuple[float, float]]]:
        centred_B = _C.group_statistics(group_index_B, reward_B, std_epsilon=0.0, divide_by_std=False).advantage
        size_B = np.bincount(group_index_B)[group_index_B]
        return centred_B * size_B / np.maximum(size_B - 1, 1), {}

"""GRPO's advantage (arXiv 2402.03300): the reward relative to its group, in units of the group's deviation."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from aer_megatron import _C
from aer_megatron.algo.advantages.base import Advantage
from aer_megatron.types import Float64Array, Int64Array


class Grpo(Advantage):
    """A = (R - mean) / (std + std_epsilon) per group, std the unbiased one (n - 1). Equal rewards give zeros."""

    kind: Literal["grpo"] = "grpo"
    min_group_size: ClassVar[int] = 2
    std_epsilon: float = Field(1e-6, gt=0, description="added to the group's standard deviation")

    def advantages(
        self, reward_B: Float64Array, group_index_B: Int64Array
    ) -> tuple[Float64Array, dict[str, tuple[float, float]]]:
        statistics = _C.group_statistics(group_index_B, reward_B, std_epsilon=self.std_epsilon, divide_by_std=True)
        return statistics.advantage, {}

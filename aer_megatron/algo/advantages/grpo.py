"""GRPO's advantage (arXiv 2402.03300): the reward relative to its group, in units of a deviation."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from aer_megatron import _C
from aer_megatron.algo.advantages.base import Advantage
from aer_megatron.types import Float64Array, Int64Array


class Grpo(Advantage):
    """A = (R - mean) / (std + std_epsilon) with the group's mean. Equal rewards give zeros."""

    kind: Literal["grpo"] = "grpo"
    min_group_size: ClassVar[int] = 2
    std_epsilon: float = Field(1e-6, gt=0, description="added to the standard deviation")
    deviation: Literal["sample", "population", "batch"] = Field(
        "sample",
        description="standard deviation: of the group with n - 1 or n, or of all rewards of the batch (2508.08221)",
    )

    def advantages(
        self, reward_B: Float64Array, group_index_B: Int64Array
    ) -> tuple[Float64Array, dict[str, tuple[float, float]]]:
        by_sample = self.deviation == "sample"
        statistics = _C.group_statistics(group_index_B, reward_B, std_epsilon=self.std_epsilon, divide_by_std=by_sample)
        if by_sample:
            return statistics.advantage, {}
        if self.deviation == "batch":
            deviation = np.std(reward_B, ddof=1) if len(reward_B) > 1 else 0.0
            return statistics.advantage / (deviation + self.std_epsilon), {}
        deviation_P = statistics.std * np.sqrt((statistics.counts - 1) / statistics.counts)
        return statistics.advantage / (deviation_P[statistics.group_index] + self.std_epsilon), {}

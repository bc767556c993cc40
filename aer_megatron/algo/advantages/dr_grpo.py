"""Dr.GRPO's advantage (arXiv 2503.20783): the reward relative to its group, in units of reward."""

from __future__ import annotations

from typing import Literal

from aer_megatron import _C
from aer_megatron.algo.advantages.base import Advantage
from aer_megatron.types import Float64Array, Int64Array


class DrGrpo(Advantage):
    """A = R - mean per group. Equal rewards give zeros."""

    kind: Literal["dr_grpo"] = "dr_grpo"

    def advantages(
        self, reward_B: Float64Array, group_index_B: Int64Array
    ) -> tuple[Float64Array, dict[str, tuple[float, float]]]:
        return _C.group_statistics(group_index_B, reward_B, std_epsilon=0.0, divide_by_std=False).advantage, {}

"""What an advantage is: a rule that compares a response's reward with those of its group.

Shape suffix: B sequences of the rollout batch, all ranks' together.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from aer_megatron.config_section import Rule
from aer_megatron.types import Float64Array, Int64Array


class Advantage(Rule):
    """The advantage of each response, with the options of ``[algo.advantage]`` as fields.

    A class of a run's own names in ``reports`` the numbers that it reports, metrics ``user/NAME``.
    """

    reports: ClassVar[tuple[str, ...]] = ()
    min_group_size: ClassVar[int] = 1  # rollouts of a prompt that it needs

    @abstractmethod
    def advantages(
        self, reward_B: Float64Array, group_index_B: Int64Array
    ) -> tuple[Float64Array, dict[str, tuple[float, float]]]:
        """Returns (the advantage of each sequence, what is reported of them).

        Args:
            reward_B: rewards, float64 [B], after any penalty on length.
            group_index_B: the group of each, int64 [B], 0..P-1; the rollouts of one prompt are a group.

        Returns:
            Float64 [B], and (sum, count) by name for all or some of ``reports``. Every rank computes the same.
        """

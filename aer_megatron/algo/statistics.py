"""The statistics that a loss reports as (sum, count): their names, their order on the wire, how one is made.

Shape suffix: T packed response tokens of one part of the batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

TokenSums: TypeAlias = "dict[str, tuple[Tensor, Tensor | float]]"  # (sum, count) by name

# a policy loss that has no such bound reports none
CLIP_STATISTICS = ("clip_low", "clip_high", "dual_clip")

# in the order in which they travel between ranks, so that stages without a loss know the layout; a rule's own follow
LOSS_STATISTICS = (
    "policy_loss",
    "entropy_bonus",
    "supervised_loss",
    "token_entropy",
    "ratio",
    *CLIP_STATISTICS,
    "approx_kl",
    "selected",
    "reference_kl",
    "importance_weight",
    "importance_weight_squared",
    "importance_cut",
    "importance_rejected",
)


def token_sum(value_T: Tensor) -> tuple[Tensor, float]:
    """Returns (sum, count) of a number or truth value per token: a float64 scalar without a graph, and T."""
    return value_T.detach().double().sum(), float(value_T.shape[0])

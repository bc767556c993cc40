"""k3 = exp(x) - x - 1: unbiased, never negative; the one of GRPO (arXiv 2402.03300)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from aer_megatron.algo.kl_estimators.base import KlEstimator

if TYPE_CHECKING:
    from torch import Tensor


class K3(KlEstimator):
    """exp(x) - x - 1, whose mean under tokens of the policy is the KL."""

    kind: Literal["k3"] = "k3"

    def estimate(self, log_ratio_T: Tensor) -> Tensor:
        return log_ratio_T.expm1() - log_ratio_T

"""k2 = x^2 / 2: biased, but its gradient under tokens of the policy is that of the KL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from aer_megatron.algo.kl_estimators.base import KlEstimator

if TYPE_CHECKING:
    from torch import Tensor


class K2(KlEstimator):
    """x^2 / 2, with the gradient -x per token."""

    kind: Literal["k2"] = "k2"

    def estimate(self, log_ratio_T: Tensor) -> Tensor:
        return 0.5 * log_ratio_T.square()

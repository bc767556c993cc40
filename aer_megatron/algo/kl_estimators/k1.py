"""k1 = -x: unbiased, of either sign; without the live ratio its expected gradient is zero."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from aer_megatron.algo.kl_estimators.base import KlEstimator

if TYPE_CHECKING:
    from torch import Tensor


class K1(KlEstimator):
    """-x = logprob - ref_logprob. By default times the live ratio, which makes it a penalty."""

    kind: Literal["k1"] = "k1"
    ratio: Literal["none", "live", "detached"] = Field(
        "live", description="the estimate is multiplied by pi / pi_old: not at all, with its gradient, without it"
    )

    def estimate(self, log_ratio_T: Tensor) -> Tensor:
        return -log_ratio_T

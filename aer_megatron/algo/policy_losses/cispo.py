"""CISPO (MiniMax-M1, arXiv 2506.13585): every token keeps its gradient, its importance weight is bounded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from aer_megatron.algo.policy_losses.base import PolicyLoss, PolicyTokens
from aer_megatron.algo.statistics import TokenSums, token_sum

if TYPE_CHECKING:
    from torch import Tensor


class Cispo(PolicyLoss):
    """-w A log pi with w = clip(r, 1 - clip_low, 1 + clip_high) held constant.

    The paper's runs have no lower bound. ScaleRL and TRL give the upper bound itself: their 5 is clip_high = 4. Here no
    bound removes a gradient: the statistics clip_low and clip_high count the tokens whose weight was cut.
    """

    kind: Literal["cispo"] = "cispo"
    clip_low: float = Field(1.0, gt=0, le=1, description="weight at least 1 - clip_low; 1 = no lower bound")
    clip_high: float = Field(4.0, gt=0, description="weight at most 1 + clip_high")

    def token_loss(self, tokens: PolicyTokens) -> tuple[Tensor, TokenSums]:
        ratio = tokens.log_ratio_T.detach().exp()
        weight = ratio.clamp(1.0 - self.clip_low, 1.0 + self.clip_high)
        return -weight * tokens.advantage_T * tokens.logprob_T, {
            "clip_low": token_sum(ratio < 1.0 - self.clip_low),
            "clip_high": token_sum(ratio > 1.0 + self.clip_high),
        }

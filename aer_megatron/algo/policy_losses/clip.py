"""PPO's clipped surrogate, with separate bounds and the dual clip."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from aer_megatron.algo.policy_losses.base import PolicyLoss, PolicyTokens
from aer_megatron.algo.statistics import TokenSums, token_sum

if TYPE_CHECKING:
    from torch import Tensor


class ClippedRatio(PolicyLoss):
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), arXiv 1707.06347, with separate bounds (DAPO, 2503.14476).

    ``dual_clip`` = c > 1 bounds the surrogate below by c A where A < 0 (arXiv 1912.09729).
    """

    clip_low: float = Field(0.2, gt=0, lt=1, description="ratio clipped below 1 - clip_low")
    clip_high: float = Field(0.2, gt=0, description="ratio clipped above 1 + clip_high (Clip-Higher: 0.28)")
    dual_clip: float = Field(0.0, ge=0, description="lower bound c > 1 on negative-advantage ratios; 0 = off")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if 0 < self.dual_clip <= 1:
            raise ValueError(f"dual_clip={self.dual_clip} must be greater than 1 (usual: 3), or 0 for off")
        return self

    def token_loss(self, tokens: PolicyTokens) -> tuple[Tensor, TokenSums]:
        advantage_T = tokens.advantage_T
        ratio_T, negative_T = tokens.log_ratio_T.exp(), advantage_T < 0
        clipped_T = ratio_T.clamp(1.0 - self.clip_low, 1.0 + self.clip_high)
        surrogate_T = (ratio_T * advantage_T).minimum(clipped_T * advantage_T)
        ratio = ratio_T.detach()
        statistics: TokenSums = {
            "clip_low": token_sum(negative_T & (ratio < 1.0 - self.clip_low)),
            "clip_high": token_sum((advantage_T > 0) & (ratio > 1.0 + self.clip_high)),
        }
        if self.dual_clip > 0:
            bounded_T = surrogate_T.maximum(self.dual_clip * advantage_T)
            surrogate_T = bounded_T.where(negative_T, surrogate_T)
            statistics["dual_clip"] = token_sum(negative_T & (ratio > self.dual_clip))
        return -surrogate_T, statistics


class Clip(ClippedRatio):
    """The clipped surrogate of every token."""

    kind: Literal["clip"] = "clip"

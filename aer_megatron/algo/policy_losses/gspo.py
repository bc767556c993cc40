"""GSPO (arXiv 2507.18071): the clipped surrogate in the ratio of a whole sequence, length taken out."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from aer_megatron.algo.policy_losses.base import PolicyTokens
from aer_megatron.algo.policy_losses.clip import ClippedRatio
from aer_megatron.algo.statistics import TokenSums

if TYPE_CHECKING:
    from torch import Tensor


class Gspo(ClippedRatio):
    """-min(s A, clip(s, 1 - clip_low, 1 + clip_high) A), s = exp(mean of log r over the sequence's sampled tokens).

    In the form per token, s held constant times pi / pi held constant (the paper's GSPO-token): value and gradient are
    those of the sequence's surrogate under ``algo.normalizer='sequences'``, which the paper has. clip_low and clip_high
    count tokens of clipped sequences.
    """

    kind: Literal["gspo"] = "gspo"
    of_sequences: ClassVar[bool] = True
    clip_low: float = Field(3e-4, gt=0, lt=1, description="sequence ratio clipped below 1 - clip_low")
    clip_high: float = Field(4e-4, gt=0, description="sequence ratio clipped above 1 + clip_high")

    def token_loss(self, tokens: PolicyTokens) -> tuple[Tensor, TokenSums]:
        assert tokens.sequence_log_ratio_T is not None
        live_T = tokens.log_ratio_T - tokens.log_ratio_T.detach()  # 0 with the gradient of log pi
        return super().token_loss(dataclasses.replace(tokens, log_ratio_T=tokens.sequence_log_ratio_T + live_T))

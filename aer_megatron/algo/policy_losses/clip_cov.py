"""Clip-Cov (Cui et al., arXiv 2505.22617): the clipped surrogate, 0 for some tokens of high covariance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from aer_megatron.algo.covariance import random_subset, token_covariance
from aer_megatron.algo.policy_losses.base import PolicyTokens
from aer_megatron.algo.policy_losses.clip import ClippedRatio
from aer_megatron.algo.statistics import TokenSums
from aer_megatron.types import BoolArray

if TYPE_CHECKING:
    from torch import Tensor


class ClipCov(ClippedRatio):
    """The clipped surrogate, 0 for a random share of the tokens whose covariance lies between two bounds."""

    kind: Literal["clip_cov"] = "clip_cov"
    fraction: float = Field(2e-4, gt=0, le=1, description="share of tokens that it silences")
    covariance_low: float = Field(1.0, description="it picks among covariances above this")
    covariance_high: float = Field(5.0, description="it picks among covariances below this")

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        if not self.covariance_low < self.covariance_high:
            raise ValueError(
                f"covariance_low={self.covariance_low} must be below covariance_high={self.covariance_high}"
            )
        return self

    def select(
        self,
        advantage_T: NDArray[np.floating],
        logprob_T: NDArray[np.floating],
        old_logprob_T: NDArray[np.floating],
        *,
        key: tuple[int, int],
    ) -> BoolArray:
        """Returns bool [T]: candidates are the tokens that the ratio does not clip; arguments as in ``PolicyLoss``."""
        covariance_T = token_covariance(advantage_T, logprob_T)
        ratio_T = np.exp(logprob_T.astype(np.float64) - old_logprob_T)
        clipped_T = ((advantage_T < 0) & (ratio_T < 1 - self.clip_low)) | (
            (advantage_T > 0) & (ratio_T > 1 + self.clip_high)
        )
        between_T = (covariance_T > self.covariance_low) & (covariance_T < self.covariance_high)
        return random_subset(between_T & ~clipped_T, fraction=self.fraction, key=key)

    def token_loss(self, tokens: PolicyTokens) -> tuple[Tensor, TokenSums]:
        assert tokens.selected_T is not None
        loss_T, statistics = super().token_loss(tokens)
        return loss_T.masked_fill(tokens.selected_T, 0.0), statistics

"""KL-Cov (Cui et al., arXiv 2505.22617): no clip; a penalty holds the tokens of the highest covariance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from aer_megatron.algo.covariance import highest_covariance, token_covariance
from aer_megatron.algo.policy_losses.base import PolicyLoss, PolicyTokens
from aer_megatron.algo.statistics import TokenSums
from aer_megatron.types import BoolArray

if TYPE_CHECKING:
    from torch import Tensor

# Two fp32 log-probabilities of one policy differ by less than this; the sign of such a difference is noise.
_ROUNDING = 1e-5


class KlCov(PolicyLoss):
    """-r A, plus coefficient |logprob - old_logprob| for a share of the tokens, those of the highest covariance.

    Where the two differ by rounding alone the penalty has no gradient: its sign would be noise.
    """

    kind: Literal["kl_cov"] = "kl_cov"
    fraction: float = Field(2e-3, gt=0, le=1, description="share of tokens, the highest, that it penalises")
    coefficient: float = Field(1.0, ge=0, description="weight of |logprob - old logprob|")

    def select(
        self,
        advantage_T: NDArray[np.floating],
        logprob_T: NDArray[np.floating],
        old_logprob_T: NDArray[np.floating],
        *,
        key: tuple[int, int],
    ) -> BoolArray:
        """Returns bool [T], the tokens of the highest covariance; arguments as in ``PolicyLoss``."""
        return highest_covariance(token_covariance(advantage_T, logprob_T), fraction=self.fraction)

    def token_loss(self, tokens: PolicyTokens) -> tuple[Tensor, TokenSums]:
        log_ratio_T, selected_T = tokens.log_ratio_T, tokens.selected_T
        assert selected_T is not None
        moved_T = log_ratio_T.detach().where(log_ratio_T.abs() < _ROUNDING, log_ratio_T)
        penalty_T = (self.coefficient * moved_T.abs()).masked_fill(~selected_T, 0.0)
        return penalty_T - log_ratio_T.exp() * tokens.advantage_T, {}

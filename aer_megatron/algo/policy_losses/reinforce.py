"""REINFORCE: the policy gradient as it stands; with the advantage ``rloo`` it is RLOO (arXiv 2402.14740)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from aer_megatron.algo.policy_losses.base import PolicyLoss, PolicyTokens
from aer_megatron.algo.statistics import TokenSums

if TYPE_CHECKING:
    from torch import Tensor


class Reinforce(PolicyLoss):
    """-A log pi: no ratio, so it is right for the first update of a batch and for no later one."""

    kind: Literal["reinforce"] = "reinforce"

    def token_loss(self, tokens: PolicyTokens) -> tuple[Tensor, TokenSums]:
        return -tokens.advantage_T * tokens.logprob_T, {}

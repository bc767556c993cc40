"""A policy loss of your own: the soft clip of SAPO (arXiv 2511.20347), a sigmoid gate where PPO has two hard bounds."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from aer_megatron.algo.policy_losses.base import PolicyLoss, PolicyTokens
from aer_megatron.algo.statistics import TokenSums, token_sum


class SoftClip(PolicyLoss):
    """-f(r) A with f(r) = 4 sigmoid(tau (r - 1)) / tau: at r = 1 the gradient is PPO's, far from it it fades out.

    Reports ``gate``, the weight f'(r) that is left of a token's gradient: 1 at r = 1.
    """

    reports: ClassVar[tuple[str, ...]] = ("gate",)
    tau_positive: float = Field(1.0, gt=0, description="how fast the gate closes where the advantage is positive")
    tau_negative: float = Field(1.05, gt=0, description="the same where it is negative")

    def token_loss(self, tokens: PolicyTokens) -> tuple[Tensor, TokenSums]:
        advantage_T = tokens.advantage_T
        positive_T = (advantage_T > 0).to(advantage_T.dtype)
        tau_T = self.tau_positive * positive_T + self.tau_negative * (1 - positive_T)
        gate_T = (tau_T * (tokens.log_ratio_T.exp() - 1)).sigmoid()
        gate = gate_T.detach()
        return -4 / tau_T * gate_T * advantage_T, {"gate": token_sum(4 * gate * (1 - gate))}

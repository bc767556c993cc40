"""The rule of Skywork-OR1, on the exact entropy."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from aer_megatron.algo.entropy_rules.base import SteeringRule, clipped


class Skywork(SteeringRule):
    """alpha moves by ``delta`` up while H < ``target``, else down; the bonus applies only while H < ``target``."""

    kind: Literal["skywork"] = "skywork"
    target: float = Field(0.2, gt=0, description="target entropy, nats")
    delta: float = Field(1e-4, gt=0, description="step of the coefficient")
    alpha_max: float = Field(0.005, gt=0, description="hard upper bound of the coefficient")

    def target_entropy(self, initial_entropy: float | None) -> float:
        return self.target

    def propose(
        self, alpha: float, integral: float, entropy: float, target: float, *, frozen: bool
    ) -> tuple[float, float]:
        step = self.delta if target - entropy > 0 else -self.delta
        return clipped(alpha + step, self.alpha_max), integral

    def upper_bound(self) -> float:
        return self.alpha_max

    def loss_coefficient(self, alpha: float, token_entropy: float) -> float:
        return alpha if token_entropy < self.target else 0.0

    def acting_options(self) -> dict[str, Any]:
        return super().acting_options() | {"target": 1e3}

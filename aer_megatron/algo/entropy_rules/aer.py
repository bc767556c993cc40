"""Adaptive entropy regularization, arXiv 2510.10959 as reconstructed in docs/aer.md; the update ``pi`` is ours."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field

from aer_megatron.algo.difficulty import normalize_difficulty
from aer_megatron.algo.entropy_rules.base import SteeringRule, clipped
from aer_megatron.types import Float64Array


class Aer(SteeringRule):
    """alpha follows H* - H with H* = tau H_0 ("initial-anchored target entropy"); d allocates the bonus to prompts."""

    kind: Literal["aer"] = "aer"
    normalize: Literal["none", "mean"] = Field("none", description="mean: d / max(its batch mean, difficulty_floor)")
    tau: float = Field(0.4, gt=0, description="target entropy as a fraction of the initial entropy")
    update: Literal["proportional", "sign", "pi"] = Field(
        "proportional", description="how alpha follows the gap between target and entropy"
    )
    eta: float = Field(1e-3, gt=0, description="gain of the integral (nat^-1 per step)")
    k_p: float = Field(0.0, ge=0, description="proportional gain of the pi update (nat^-1)")
    alpha_max: float = Field(0.05, gt=0, description="hard upper bound of the coefficient")
    difficulty_floor: float = Field(0.02, ge=0, description="mean d below which the integrator freezes; see normalize")

    def target_entropy(self, initial_entropy: float | None) -> float:
        return math.nan if initial_entropy is None else self.tau * initial_entropy

    def propose(
        self, alpha: float, integral: float, entropy: float, target: float, *, frozen: bool
    ) -> tuple[float, float]:
        gap = target - entropy
        if self.update == "pi":
            # The proportional term stays on while frozen: it remembers nothing, so it cannot wind up.
            integral = integral if frozen else clipped(integral + self.eta * gap, self.alpha_max)
            return clipped(integral + self.k_p * gap, self.alpha_max), integral
        if frozen:
            return alpha, integral
        direction = float((gap > 0) - (gap < 0)) if self.update == "sign" else gap
        return clipped(alpha + self.eta * direction, self.alpha_max), integral

    def upper_bound(self) -> float:
        return self.alpha_max

    def freeze_floor(self) -> float | None:
        return self.difficulty_floor

    def allocation(self, difficulty_P: Float64Array) -> Float64Array:
        return normalize_difficulty(difficulty_P, mode=self.normalize, floor=self.difficulty_floor)

    def acting_options(self) -> dict[str, Any]:
        return super().acting_options() | {"tau": 2.0}  # a target above the entropy there is: alpha rises

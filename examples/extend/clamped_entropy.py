"""An entropy rule of your own: a bonus that keeps H inside a band, as AEnt (arXiv 2509.03493) adapts its coefficient.

AEnt measures a clamped entropy, over the likeliest tokens alone; here H is the exact one of the whole vocabulary.
"""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field, model_validator

from aer_megatron.algo.entropy_rules.base import SteeringRule, clipped


class ClampedEntropy(SteeringRule):
    """alpha rises while H is below the band, falls while it is above, and rests inside; no bonus above the band.

    Reports ``inside_band``: 1 in a step whose H is inside, else 0.
    """

    reports: ClassVar[tuple[str, ...]] = ("inside_band",)
    low: float = Field(0.2, ge=0, description="lower end of the band, nats")
    high: float = Field(0.6, gt=0, description="upper end of the band, nats")
    gain: float = Field(1e-3, gt=0, description="change of the coefficient per nat outside the band and step")
    alpha_max: float = Field(0.05, gt=0, description="hard upper bound of the coefficient")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low={self.low} must be below high={self.high}")
        return self

    def target_entropy(self, initial_entropy: float | None) -> float:
        return self.low

    def propose(
        self, alpha: float, integral: float, entropy: float, target: float, *, frozen: bool
    ) -> tuple[float, float]:
        outside = min(max(entropy, self.low), self.high) - entropy  # > 0 below the band
        return clipped(alpha + self.gain * outside, self.alpha_max), integral

    def upper_bound(self) -> float:
        return self.alpha_max

    def loss_coefficient(self, alpha: float, token_entropy: float) -> float:
        return alpha if token_entropy <= self.high else 0.0

    def report(self, alpha: float, token_entropy: float) -> dict[str, tuple[float, float]]:
        return {"inside_band": (float(self.low <= token_entropy <= self.high), 1.0)}

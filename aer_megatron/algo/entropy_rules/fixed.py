"""A constant coefficient, the bonus of classic reinforcement learning."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field

from aer_megatron.algo.entropy_rules.base import EntropyRule


class Unsteered(EntropyRule):
    """Rules without a target: a fraction of H_0 is reported in its place, so that runs can be read beside ``aer``."""

    reference: float = Field(
        0.4, gt=0, description="fraction of the initial entropy that is reported as target and that alarm_low is of"
    )

    def target_entropy(self, initial_entropy: float | None) -> float:
        return math.nan if initial_entropy is None else self.reference * initial_entropy


class Fixed(Unsteered):
    """The coefficient is an option."""

    kind: Literal["fixed"] = "fixed"
    coefficient: float = Field(1e-3, ge=0, description="constant coefficient")

    def initial_alpha(self) -> float:
        return self.coefficient

    def loss_coefficient(self, alpha: float, token_entropy: float) -> float:
        return self.coefficient

    def label(self, alpha: float) -> str:
        return f"alpha {alpha:.4g} fixed"

    def acting_options(self) -> dict[str, Any]:
        return {"coefficient": 1e-2}

"""What an entropy rule is: a rule that says how the entropy of a rollout batch becomes the coefficient of the bonus.
algo/controller.py does the rest, once for all of them: anchor, hold, freeze, rate limit, alarms.

Symbols, as in docs/aer.md: H is the token-mean entropy of the rollout batch (nats), H_0 that of the first usable batch,
H* the target, d the difficulty of a prompt, alpha the coefficient that the controller remembers.

Shape suffix: P prompts.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from aer_megatron.config_section import Rule
from aer_megatron.types import Float64Array


class EntropyRule(Rule):
    """A rule with the options of ``[algo.entropy]`` that every rule has. One that moves alpha is a ``SteeringRule``.

    Numbers in, numbers out, the same on every rank. A class of a run's own names in ``reports`` the numbers that
    ``report`` returns, metrics ``user/NAME``.
    """

    reports: ClassVar[tuple[str, ...]] = ()

    difficulty: Literal["linear_deficit", "threshold", "complement"] = Field(
        "linear_deficit", description="how a prompt's difficulty d follows from its accuracy; measured by every rule"
    )
    rho: float = Field(0.5, gt=0, le=1, description="accuracy from which a prompt counts as easy")
    source: Literal["group", "ledger"] = Field("group", description="accuracy from this step's group or the ledger")
    alarm_low: float = Field(0.7, ge=0, description="collapse alarm below this fraction of the target; 0 = off")
    alarm_high: float = Field(
        1.5, ge=0, description="explosion alarm above this multiple of the initial entropy; 0 = off"
    )
    mismatch_bound: float = Field(
        0.1, ge=0, description="alpha is held above this KL (nats) between rollout engine and trainer; 0 = off"
    )

    @property
    def acts(self) -> bool:
        """Whether the loss has the bonus, and a gradient through the entropy.

        Decided by the rule and never by a coefficient's value: alpha starts at 0 and grows, and one step built without
        the graph would be a step that the controller believes it acted in.
        """
        return True

    def initial_alpha(self) -> float:
        """Returns alpha before the first rollout batch."""
        return 0.0

    @abstractmethod
    def target_entropy(self, initial_entropy: float | None) -> float:
        """Returns H* in nats, or what is reported in its place; NaN where it needs H_0 and that is None."""

    def loss_coefficient(self, alpha: float, token_entropy: float) -> float:
        """Returns what multiplies d(q) H in the loss of the step, given alpha after the update and H (NaN: unknown)."""
        return alpha

    def allocation(self, difficulty_P: Float64Array) -> Float64Array:
        """Returns each prompt's share of the coefficient, float64 [P]; this one spreads it evenly."""
        return np.ones_like(difficulty_P)

    def label(self, alpha: float) -> str:
        """Returns what the reason of a step calls a rule that does not steer."""
        return f"alpha {alpha:.4g}"

    def report(self, alpha: float, token_entropy: float) -> dict[str, tuple[float, float]]:
        """Returns (sum, count) by name for all or some of ``reports``, given alpha after the update and H."""
        return {}

    def acting_options(self) -> dict[str, Any]:
        """Returns options of ``[algo.entropy]`` under which a short trial has a bonus whatever its entropy."""
        return {}


class SteeringRule(EntropyRule):
    """A rule that moves alpha towards a target, at most ``max_change`` a step."""

    shadow: bool = Field(False, description="log what the controller would do; the loss uses coefficient 0")
    max_change: float = Field(0.0, ge=0, description="largest change of alpha in one step; 0 = no rate limit")

    @property
    def acts(self) -> bool:
        """Whether the loss has the bonus: not in shadow."""
        return not self.shadow

    @abstractmethod
    def propose(
        self, alpha: float, integral: float, entropy: float, target: float, *, frozen: bool
    ) -> tuple[float, float]:
        """Returns (alpha, integral) after the batch, before the rate limit; finite and >= 0.

        Args:
            integral: what the rule remembers beside alpha; 0 at the start.
            entropy: H in nats, finite.
            target: H* in nats, finite.
            frozen: the bonus has no authority (``freeze_floor``): what accumulates must stay.
        """

    def upper_bound(self) -> float:
        """Returns the bound of alpha that has the last word, also over the rate limit."""
        return math.inf

    def freeze_floor(self) -> float | None:
        """Returns the mean d below which the rule is frozen; None where d plays no part."""
        return None

    def acting_options(self) -> dict[str, Any]:
        return {"shadow": False}


def clipped(value: float, upper: float) -> float:
    """Returns ``value`` within [0, upper]."""
    return min(max(value, 0.0), upper)

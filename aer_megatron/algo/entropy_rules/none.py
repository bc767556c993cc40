"""No entropy bonus: plain GRPO."""

from __future__ import annotations

from typing import Any, Literal

from aer_megatron.algo.entropy_rules.fixed import Unsteered


class NoBonus(Unsteered):
    """The loss has no bonus; entropy and alarms are watched all the same."""

    kind: Literal["none"] = "none"

    @property
    def acts(self) -> bool:
        """Whether the loss has the bonus: never."""
        return False

    def label(self, alpha: float) -> str:
        return "no coefficient"

    def acting_options(self) -> dict[str, Any]:
        return {"kind": "fixed", "coefficient": 1e-2}

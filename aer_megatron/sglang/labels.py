"""The weight versions that servers carry: which run's weights they serve, and whether those were verified."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from typing import Any

from aer_megatron.sglang.replies import BadReply, shown

_UNVERIFIED = "-unverified"
_LABEL = re.compile(r"(aer-[0-9a-f]{16})/(\d{1,18})", re.ASCII)


class ForeignWeights(BadReply):
    """Tokens of weights that another run has given the server."""


def new_run_id() -> str:
    """Returns what tells the weights of this launch from those of every other, on any server."""
    return f"aer-{secrets.token_hex(8)}"


@dataclass(frozen=True, slots=True)
class WeightLabels:
    """How this run spells a weight version: its name and the policy version.

    Example: ``WeightLabels("aer-0123456789abcdef").verified(5)`` is "aer-0123456789abcdef/5".
    """

    run: str

    def verified(self, version: int) -> str:
        """Returns the label of a server while it serves policy ``version``, verified."""
        return f"{self.run}/{version}"

    def unverified(self, version: int) -> str:
        """Returns the label of a server between the transfer of ``version`` and its verification."""
        return f"{self.run}/{version}{_UNVERIFIED}"

    def is_foreign(self, label: Any) -> bool:
        """Returns whether a label, of whatever type, is that of another run's weights, verified or not."""
        named = _LABEL.fullmatch(label.removesuffix(_UNVERIFIED)) if isinstance(label, str) else None
        return named is not None and named[1] != self.run

    def version_of(self, label: Any) -> int:
        """Returns the policy version of a verified label of this run.

        Raises:
            ForeignWeights: it is another run's.
            BadReply: it is none.
        """
        named = _LABEL.fullmatch(label) if isinstance(label, str) else None
        if named is not None and named[1] == self.run:
            return int(named[2])
        if self.is_foreign(label):
            raise ForeignWeights(
                f"it serves {shown(label)}, weights of another run (this one is {self.run}): two runs share a server; "
                "give each run servers of its own"
            )
        raise BadReply(f"the weight version is {shown(label)}: these weights were never verified")


@dataclass(frozen=True, slots=True)
class ServedLabels(WeightLabels):
    """The one label that servers carry by themselves, ``run``: their weights are another's, and stay what they are."""

    def verified(self, version: int) -> str:
        """Returns the label."""
        del version
        return self.run

    def is_foreign(self, label: Any) -> bool:
        """Returns whether the weights are no longer those that were found."""
        return bool(label != self.run)

    def version_of(self, label: Any) -> int:
        """Returns 0; raises ForeignWeights where the weights are no longer those that were found."""
        if self.is_foreign(label):
            raise ForeignWeights(f"its weights changed meanwhile: it served {shown(self.run)} and now {shown(label)}")
        return 0

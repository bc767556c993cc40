"""Bad records that ``data.on_bad_record="skip"`` leaves out: counted, and the first one's reason kept for the user."""

from __future__ import annotations

from collections.abc import Callable

OnSkip = Callable[[str], None]  # is told why a record is left out

_MAX_REASON = 300


def ignore(reason: str) -> None:
    """Tells nobody."""
    del reason


class SkippedRecords:
    """Called with the reason of every record that is left out."""

    def __init__(self) -> None:
        self.count = 0
        self.first = ""

    def __call__(self, reason: str) -> None:
        self.first = self.first or reason[:_MAX_REASON]
        self.count += 1

    def lines(self, option: str, num_left: int) -> tuple[str, ...]:
        """Returns the line for the user; none where nothing was left out of ``option``."""
        if not self.count:
            return ()
        total = self.count + num_left
        return (f"{option}: {self.count} of {total} records are bad and left out; the first: {self.first}",)

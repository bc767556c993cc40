"""Two runs that must be one: their metric lines, where they stand, their files; and the table that says so.

This file does NOT start runs or read checkpoints' tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aer_megatron.report.metrics import MACHINE_PREFIXES, unit_of

_WIDEST_NOTE = 160


@dataclass(frozen=True, slots=True)
class Row:
    """One claim and what came out. Example: ``Row("tp 2 -> pp 2: step 2", 3.1e-7, 1e-5)``; bound 0 is "every bit"."""

    claim: str
    difference: float  # 0 = equal; infinite where the two cannot be compared
    bound: float
    note: str = ""  # what differs, or what the row does not show

    @property
    def holds(self) -> bool:
        return self.difference <= self.bound


def compare_lines(
    one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]], *, bound: float
) -> tuple[float, str]:
    """Returns (largest difference, where) between two runs' metric lines of the same steps, times aside.

    The difference of fractions is relative to the larger of both and 1; anything else must be equal, but for texts,
    which spell numbers and are compared where ``bound`` is 0 alone.
    """
    if len(one) != len(other):
        return math.inf, f"{len(one)} steps and {len(other)} steps"
    if not one:
        return math.inf, "no steps"
    worst, where = 0.0, ""
    for mine, theirs in zip(one, other, strict=True):
        for name in dict.fromkeys([*mine, *theirs]):
            if name.startswith(MACHINE_PREFIXES):
                continue
            if bound and unit_of(name) == "text":
                continue
            found = _value_difference(mine.get(name, "absent"), theirs.get(name, "absent"))
            if found > worst:
                worst = found
                where = f"step {mine.get('step')}: {name} is {mine.get(name)!r} and {theirs.get(name)!r}"
    return worst, where


def compare_tables(one: Any, other: Any, *, path: str = "") -> tuple[float, str]:
    """Returns (largest difference, where) between two nested tables; what is no fraction must be equal."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        keys = dict.fromkeys([*one, *other])
        found = [compare_tables(one.get(k), other.get(k), path=f"{path}.{k}".strip(".")) for k in keys]
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        found = [compare_tables(a, b, path=f"{path}[{i}]") for i, (a, b) in enumerate(zip(one, other))]
    else:
        difference = _value_difference(one, other)
        return difference, f"{path} is {one!r} and {other!r}" if difference else ""
    return max(found, key=lambda each: each[0], default=(0.0, ""))


def compare_files(one: Mapping[str, str], other: Mapping[str, str]) -> tuple[float, str]:
    """Returns (0, "") where two mappings of file names to digests are equal, else (inf, the first that differs)."""
    for name in sorted({*one, *other}):
        if one.get(name) != other.get(name):
            both = name in one and name in other
            return math.inf, f"{name} {'differs' if both else 'is in one of the two alone'}"
    return (0.0, "") if one else (math.inf, "no files")


def table_text(rows: Iterable[Row]) -> str:
    """Returns one line per row, columns aligned, with the note below where a row does not hold."""
    cells = [("claim", "difference", "bound", "")]
    rows = list(rows)
    for row in rows:
        difference = "none" if row.difference == 0 else f"{row.difference:.2g}"
        bound = "every bit" if row.bound == 0 else f"{row.bound:.2g}"
        cells.append((row.claim, difference, bound, "OK" if row.holds else "FAILED"))
    widths = [max(len(line[column]) for line in cells) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    lines.insert(1, "  ".join("-" * width for width in widths[:3]))
    text = lines[:2]
    for line, row in zip(lines[2:], rows, strict=True):
        text.append(line)
        if row.note:
            text.append(f"    {row.note[:_WIDEST_NOTE]}")
    return "\n".join(text)


def _value_difference(one: Any, other: Any) -> float:
    """Returns 0 for equal values, the relative difference of fractions, infinity for anything else."""
    if type(one) is type(other) and one == other:
        return 0.0
    if not (isinstance(one, float) and isinstance(other, float) and math.isfinite(one) and math.isfinite(other)):
        return math.inf
    return abs(one - other) / max(1.0, abs(one), abs(other))

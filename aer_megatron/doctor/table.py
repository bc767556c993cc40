"""The doctor's table and its findings as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from aer_megatron.doctor.diagnosis import Check, Diagnosis

_HEAD = ("check", "of", "value", "reference", "tolerance", "result")
_MAX_NOTE = 120


def table_text(checks: Sequence[Check]) -> str:
    """Returns one line per check, columns aligned, notes below failed and skipped rows."""
    rows = [_HEAD, *(_cells(check) for check in checks)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    lines = [_line(_HEAD, widths), _line(["-" * width for width in widths], widths)]
    for check in checks:
        note = f"  {_short(check.note)}" if check.note and check.status != "pass" else ""
        lines.append(_line(_cells(check), widths) + note)
    return "\n".join(lines)


def findings_text(causes: Sequence[Diagnosis]) -> str:
    """Returns the causes with their remedies and the failed rows that each accounts for; empty without any."""
    lines: list[str] = []
    for number, cause in enumerate(causes, start=1):
        rows = ", ".join(sorted({f"{check.area}: {check.measure}" for check in cause.accounts_for}))
        count = len(cause.accounts_for)
        lines += [
            f"cause {number}: {cause.cause}",
            f"  remedy: {cause.remedy}",
            f"  accounts for {count} failed row{'s' if count > 1 else ''} ({rows})",
        ]
    return "\n".join(lines)


def verdict_text(checks: Sequence[Check], seconds: float) -> str:
    """Returns the last line: how many rows passed, failed and were left out."""
    counts = {status: sum(check.status == status for check in checks) for status in ("pass", "fail", "skipped")}
    word = "unfit" if counts["fail"] else "fit"
    return (
        f"doctor: {word}; {counts['pass']} passed, {counts['fail']} failed, {counts['skipped']} skipped in "
        f"{seconds:.0f} s"
    )


def _cells(check: Check) -> tuple[str, ...]:
    tolerance = "" if check.tolerance is None else f"{check.tolerance:.2g} {'rel' if check.relative else 'abs'}"
    if check.tolerance == 0:
        tolerance = "exact"
    return (
        f"{check.area}: {check.measure}",
        check.subject,
        _number(check.value),
        _number(check.reference),
        tolerance,
        check.status,
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.7g}"


def _line(cells: Iterable[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def _short(note: str) -> str:
    return note if len(note) <= _MAX_NOTE else note[: _MAX_NOTE - 3] + "..."

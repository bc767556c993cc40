"""What the data tool found, as tables for a terminal and as values for a JSON report.

Texts of problems are shown as text: no markup, no control or bidirectional character, cut to a line.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from aer_megatron.prepare_data.check import Findings
from aer_megatron.prepare_data.decontaminate import Hit
from aer_megatron.prepare_data.fetch import Fetched
from aer_megatron.prepare_data.problems import BadRow, Problem

_MAX_ROWS = 20
_TEXT_WIDTH = 60
_MAX_CHARACTERS = 2000


def plain(text: object, width: int = _TEXT_WIDTH) -> Text:
    """Returns a text that does nothing to a terminal, at most ``width`` characters long."""
    shown = "".join(mark if mark.isprintable() else " " for mark in str(text)[:_MAX_CHARACTERS])
    shown = " ".join(shown.split())
    return Text(shown if len(shown) <= width else shown[: width - 1] + "…")


def fetched_table(fetched: Mapping[str, tuple[Fetched, int | None]]) -> Table:
    """Returns one row per set: {name: (what was written, the size that it is known to have)}."""
    table = _table("set", "problems", "repeated rows", "bad rows", "file")
    for name, (found, size) in fetched.items():
        count = str(found.num_problems) + (f", not {size}" if size not in (None, found.num_problems) else "")
        table.add_row(name, count, str(found.num_repeated), str(len(found.bad)), plain(found.path, 200))
    return table


def checked_table(checked: Mapping[Path, Findings]) -> Table:
    """Returns one row per file: how much of it is at fault."""
    table = _table("file", "records", "bad rows", "duplicates", "several answers", "not judged", "kept")
    for path, found in checked.items():
        counts = (
            found.num_records,
            len(found.bad),
            sum(len(group) - 1 for group in found.duplicates),
            sum(map(len, found.conflicts)),
            len(found.unjudged),
            len(found.kept),
        )
        table.add_row(plain(path.name), *map(str, counts))
    return table


def fault_tables(found: Findings) -> Iterable[Table]:
    """Yields a table of the records of each fault, the first of them."""
    if found.bad:
        yield _listing("bad rows", ("row", "reason"), [(item.where, item.reason) for item in found.bad])
    if found.conflicts:
        rows = [(item.where, item.record.answer, item.text) for group in found.conflicts for item in group]
        yield _listing("one problem, several answers", ("row", "answer", "problem"), rows)
    if found.unjudged:
        shown = [(item.problem.where, item.reason, item.problem.record.answer) for item in found.unjudged]
        yield _listing("gold answers not judged correct", ("row", "reason", "answer"), shown)


def hit_tables(hits: Sequence[Hit]) -> Iterable[Table]:
    """Yields how many hits each evaluation set has, and the first ones."""
    kinds = ("identical", "exact", "ngram")
    table = _table("evaluation set", *kinds, "training records")
    for against in sorted({hit.against for hit in hits}):
        own = [hit for hit in hits if hit.against == against]
        counts = [sum(hit.kind == kind for hit in own) for kind in kinds]
        table.add_row(plain(Path(against).name), *map(str, counts), str(len(own)))
    if hits:
        yield table
        least_alike_first = sorted(hits, key=lambda hit: (-kinds.index(hit.kind), hit.share))
        rows = [(hit.kind, f"{hit.share:.2f}", hit.train.text, hit.evaluation.text) for hit in least_alike_first]
        yield _listing("hits, the least alike first", ("kind", "share", "training", "evaluation"), rows)


def bad_values(bad: Iterable[BadRow]) -> list[dict[str, Any]]:
    """Returns bad rows for a JSON report."""
    return [item._asdict() for item in bad]


def problem_value(problem: Problem) -> dict[str, Any]:
    """Returns a record for a JSON report."""
    record = problem.record
    return {"where": problem.where, "id": record.id, "problem": problem.text, "answer": record.answer}


def findings_value(found: Findings) -> dict[str, Any]:
    """Returns the findings on one file for a JSON report."""
    return {
        "records": found.num_records,
        "without_fault": len(found.kept),
        "bad_rows": bad_values(found.bad),
        "duplicates": [[problem_value(item) for item in group] for group in found.duplicates],
        "several_answers": [[problem_value(item) for item in group] for group in found.conflicts],
        "not_judged": [problem_value(item.problem) | {"reason": item.reason} for item in found.unjudged],
    }


def hit_value(hit: Hit) -> dict[str, Any]:
    """Returns a hit, both texts with it, for a JSON report or a line of the list of hits."""
    return {
        "kind": hit.kind,
        "share": round(hit.share, 4),
        "train": problem_value(hit.train),
        "against": hit.against,
        "evaluation": problem_value(hit.evaluation),
    }


def _listing(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    more = f", the first {_MAX_ROWS} of {len(rows)}" if len(rows) > _MAX_ROWS else ""
    table = _table(*columns, title=title + more)
    for row in rows[:_MAX_ROWS]:
        table.add_row(*map(plain, row))
    return table


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold", min_width=4)
    return table

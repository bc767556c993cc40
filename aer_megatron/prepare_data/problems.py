"""Problem files as the data tool sees them: every record with its place, and what is bad about the others.

This file does NOT judge (check.py) or compare sets (decontaminate.py).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from aer_megatron.data.records import Record, Rules, parse_record, stable_id
from aer_megatron.data.rows import Row, read_rows
from aer_megatron.files.whole_files import replace_file
from aer_megatron.rewards.registry import is_built_in


class Problem(NamedTuple):
    where: str  # "line 3" or "row 3"
    record: Record

    @property
    def text(self) -> str:
        """All that is put to the model."""
        return "\n".join(message.content for message in self.record.conversation) or self.record.problem


class BadRow(NamedTuple):
    where: str
    reason: str


class ProblemFile(NamedTuple):
    path: Path
    problems: list[Problem]
    bad: list[BadRow]


def read_problems(path: Path, verifier: str) -> ProblemFile:
    """Returns the records of a JSONL or Parquet file; records that name no verifier get ``verifier``.

    Raises:
        ValueError: the file cannot be read, or holds no record.
    """
    problems: list[Problem] = []
    bad: list[BadRow] = []
    for found in parse_rows(read_rows(path), verifier):
        if isinstance(found, Problem):
            problems.append(found)
        else:
            bad.append(found)
    if not problems:
        raise ValueError(f"{path} holds no record{first_of(bad)}")
    return ProblemFile(path, problems, bad)


def parse_rows(
    rows: Iterable[Row], verifier: str, convert: Callable[[Any], Any] = lambda row: row
) -> Iterator[Problem | BadRow]:
    """Yields what each row is once it is converted: a record, or a bad row."""
    rules = Rules("answer", verifier, is_built_in)
    for where, load in rows:
        try:
            yield Problem(where, parse_record(convert(load()), rules))
        except ValueError as error:
            yield BadRow(where, str(error))


def first_of(bad: Sequence[BadRow]) -> str:
    """Returns what a message says of bad rows: how many and the first; nothing where there is none."""
    return f"; the first of {len(bad)} bad rows, {bad[0].where}: {bad[0].reason}" if bad else ""


def write_problems(path: Path, problems: Iterable[Problem], verifier: str) -> None:
    """Writes a JSONL file that reads as the same records, in one atomic rename.

    Raises:
        ValueError: it cannot be written, or its name does not end in .jsonl.
    """
    write_lines(path, (_to_row(problem.record, verifier) for problem in problems))


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    """Writes values as the lines of a JSONL file; errors as ``write_problems``."""
    if path.suffix != ".jsonl":
        raise ValueError(f"{path} must end in .jsonl")
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_text(path: Path, text: str) -> None:
    """Writes a file in one atomic rename; raises ValueError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # a lone surrogate has no UTF-8; its escape is what JSON has for it
        replace_file(path, text.encode("utf-8", "backslashreplace").decode())
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}; choose another place") from None


def check_outputs(outputs: Iterable[Path | None], inputs: Iterable[Path]) -> None:
    """Raises ValueError where an output is an input or another output: neither may be overwritten."""
    taken = {os.path.realpath(path) for path in inputs}
    for path in (path for path in outputs if path is not None):
        if os.path.realpath(path) in taken:
            raise ValueError(f"{path} is read or written already; give the output a name of its own")
        taken.add(os.path.realpath(path))


def _to_row(record: Record, verifier: str) -> dict[str, Any]:
    """Returns the row that ``parse_record`` makes the record of."""
    conversation = [message._asdict() for message in record.conversation]
    row: dict[str, Any] = {"prompt": conversation} if conversation else {"problem": record.problem}
    row["answer"] = record.answer
    parts = (part for message in record.conversation[:-1] for part in message)
    if record.id != stable_id(*parts, record.problem, record.answer):
        row["id"] = record.id
    if record.verifier != verifier:
        row["verifier"] = record.verifier
    if record.response is not None:
        row["response"] = record.response
    return row | dict(record.metadata)

"""Writes a known set as this project's JSONL: from the hub, or from a file of it that is already here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from aer_megatron.data.hub import dataset_files
from aer_megatron.data.rows import Row, read_rows
from aer_megatron.prepare_data.known_sets import KnownSet
from aer_megatron.prepare_data.problems import BadRow, Problem, first_of, parse_rows, write_problems


class Fetched(NamedTuple):
    path: Path
    num_problems: int
    num_repeated: int  # rows with the problem and the answer of one before
    bad: list[BadRow]


def fetch(known: KnownSet, path: Path, *, given: Path | None, verifier: str) -> Fetched:
    """Writes ``path`` from the set's rows, or from those of the file ``given``; each record once.

    Raises:
        ValueError: the hub does not have the set, a file cannot be read or written, or no row makes a record.
        RuntimeError: the hub cannot be reached.
    """
    once: dict[int, Problem] = {}
    num_records = 0
    bad: list[BadRow] = []
    for found in parse_rows(_rows(known, given), verifier, known.convert):
        if isinstance(found, BadRow):
            bad.append(found)
        else:
            num_records += 1
            once.setdefault(found.record.id, found)
    if not once:
        raise ValueError(f"{given or known.dataset} holds no record{first_of(bad)}")
    write_problems(path, once.values(), verifier)
    return Fetched(path, len(once), num_records - len(once), bad)


def _rows(known: KnownSet, given: Path | None) -> Iterator[Row]:
    if given is not None:
        yield from read_rows(given)
        return
    for subset in known.subsets:
        for file in dataset_files(known.dataset, split=known.split, subset=subset):
            yield from (Row(f"{subset or known.split}, {where}", load) for where, load in read_rows(file))

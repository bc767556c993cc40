"""Turns a ``SourceSection`` into problem records: JSONL and Parquet files, and procedural sets.

A record is what a file says, checked and given a stable id; it holds no token ids (data/prompts.py makes
those).

This file does NOT decide which verifier exists (rewards/registry.py) or in which order records are used
(data/prompts.py).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, NamedTuple

from aer_megatron.data import countdown, procedural
from aer_megatron.data.skipped import OnSkip, ignore
from aer_megatron.files.json_input import kind_of, parse_json
from aer_megatron.options.data import SourceSection

_KNOWN_FIELDS = frozenset({"problem", "prompt", "answer", "verifier", "id", "response"})
_MAX_ID = 2**64
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Record:
    """One problem as its source states it.

    Example: ``Record(id=0x9AE1, problem="3,5,2,8=24>", answer="24", verifier="countdown", response=None)``
    """

    id: int  # unsigned 64-bit
    problem: str
    answer: str
    verifier: str
    response: str | None  # only supervised data has one
    metadata: Mapping[str, Any] = field(default_factory=dict)  # the fields this project does not know


class LoadedRecords(NamedTuple):
    records: tuple[Record, ...]
    num_skipped: int


class _Row(NamedTuple):
    where: str  # "line 3" or "row 3"
    load: Callable[[], Any]  # raises ValueError where the row is malformed


class _Rules(NamedTuple):
    """What makes a record of a file good."""

    needs: str  # "answer" or "response"
    default_verifier: str
    may_name: Callable[[str], bool]  # whether a record may name this verifier


def load_records(
    source: SourceSection,
    *,
    on_bad_record: Literal["error", "skip"],
    default_verifier: str,
    may_name: Callable[[str], bool],
    on_skip: OnSkip = ignore,
) -> LoadedRecords:
    """Returns the records of ``source``, each with an answer, and how many bad ones were skipped.

    A file record is ``{"problem" | "prompt", "answer", optional "verifier", "id", "response"}``; other fields
    are kept as metadata. Records without a verifier get ``default_verifier``; procedural sets name their own. A name is
    code to run, so a record may give one only if it is the default or ``may_name`` says so. ``on_skip`` is told of
    every record that is skipped.

    Raises:
        ValueError: a malformed record (file, line and reason) with ``on_bad_record="error"``; a missing or
            empty file; an unknown procedural set or option.
    """
    if source.task is None:
        return _load_file(source, on_bad_record, _Rules("answer", default_verifier, may_name), on_skip)
    if source.task == "countdown":
        texts = countdown.generate(size=source.size, seed=source.seed, options=source.options).texts()
        records = [_procedural_record(problem, answer, "countdown", {}) for problem, answer in zip(*texts, strict=True)]
    else:
        records = [_procedural_record(*item[:2], source.task, item.metadata) for item in procedural.generate(source)]
    return LoadedRecords(tuple(records), 0)


def load_supervised_records(
    source: SourceSection, *, on_bad_record: Literal["error", "skip"], on_skip: OnSkip = ignore
) -> LoadedRecords:
    """Returns the records of a file in which every record has a "response"; "answer" may be absent there.

    Raises:
        ValueError: as ``load_records``; also for a procedural ``source.task``, which has no responses.
    """
    if source.task is not None:
        raise ValueError(
            f"sft.source.task={source.task!r} cannot answer itself; use task='countdown', or a path to a "
            f"file whose "
            f'records have a "response"'
        )
    rules = _Rules("response", "", lambda name: True)  # none of the verifiers is called
    return _load_file(source, on_bad_record, rules, on_skip)


def stable_id(*parts: str) -> int:
    """Returns an unsigned 64-bit id of ``parts``: BLAKE2b over their UTF-8 bytes, lengths included.

    It is the same on every machine, Python version and process (unlike ``hash``).

    Raises:
        ValueError: a part holds a lone surrogate and is no valid text.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return int.from_bytes(digest.digest(), "little")


def _procedural_record(problem: str, answer: str, verifier: str, metadata: Mapping[str, Any]) -> Record:
    return Record(stable_id(problem, answer), problem, answer, verifier, None, metadata)


def _load_file(
    source: SourceSection, on_bad_record: Literal["error", "skip"], rules: _Rules, on_skip: OnSkip
) -> LoadedRecords:
    path = Path(source.path or "")
    records: list[Record] = []
    owners: dict[int, tuple[str, Record]] = {}
    first_reason, num_skipped = "", 0
    for where, load in _read_rows(path):
        try:
            record = _parse(load(), rules)
            _check_owner(owners.setdefault(record.id, (where, record)), record)
        except ValueError as error:
            reason = f"{path}, {where}: {error}"
            if on_bad_record == "error":
                raise ValueError(f"{reason}; correct it, or set data.on_bad_record='skip' to count and skip") from None
            first_reason, num_skipped = first_reason or reason, num_skipped + 1
            on_skip(reason)
            continue
        records.append(record)
    if not records:
        detail = f"all {num_skipped} are bad, the first: {first_reason}" if num_skipped else "the file is empty"
        raise ValueError(f"path={str(path)!r} holds no records ({detail}); give a file with at least one")
    return LoadedRecords(tuple(records), num_skipped)


def _read_rows(path: Path) -> Iterator[_Row]:
    if not path.is_file():
        raise ValueError(f"path={str(path)!r} is not a file; give an existing .jsonl or .parquet file")
    if path.suffix == ".parquet":
        return _read_parquet(path)
    if path.suffix in (".jsonl", ".ndjson"):
        return _read_jsonl(path)
    raise ValueError(f"path={str(path)!r} ends with {path.suffix!r}; known are .jsonl, .ndjson and .parquet")


def _read_jsonl(path: Path) -> Iterator[_Row]:
    # Split on \n alone: str.splitlines would also cut at U+2028, which JSON allows inside a text.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            if line.strip():
                yield _Row(f"line {number}", lambda line=line: parse_json(line))  # type: ignore[misc]


def _read_parquet(path: Path) -> Iterator[_Row]:
    # pyarrow is slow to import and JSONL does not need it
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield _Row(f"row {number}", lambda row=row: row)  # type: ignore[misc]
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"path={str(path)!r} is not a readable Parquet file: {reason}; write it again") from None


def _parse(row: Any, rules: _Rules) -> Record:
    if not isinstance(row, dict):
        raise ValueError(f"a record must be an object, this is {kind_of(row)}")
    row = {key: value for key, value in row.items() if value is not None}
    if "problem" in row and "prompt" in row:
        raise ValueError('a record has "problem" or "prompt", not both')
    problem = _text(row, "problem" if "problem" in row else "prompt", missing='"problem" (or "prompt")')
    response = _text(row, "response") if "response" in row or rules.needs == "response" else None
    answer = _text(row, "answer", numbers=True) if "answer" in row or rules.needs == "answer" else ""
    verifier = _verifier(row, rules) if "verifier" in row else rules.default_verifier
    content_id = stable_id(problem, answer)
    metadata = {key: value for key, value in row.items() if key not in _KNOWN_FIELDS}
    return Record(_parse_id(row.get("id"), content_id), problem, answer, verifier, response, metadata)


def _verifier(row: Mapping[str, Any], rules: _Rules) -> str:
    name = _text(row, "verifier")
    if name != rules.default_verifier and not rules.may_name(name):
        raise ValueError(
            f'"verifier"={name[:80]!r} is neither built in (math, math_verify, countdown, reasoning_gym:NAME) nor '
            "listed in data.verifiers; a record cannot name code by itself: list the function there if it is yours"
        )
    return name


def _text(row: Mapping[str, Any], key: str, *, missing: str = "", numbers: bool = False) -> str:
    if key not in row:
        raise ValueError(f"{missing or json.dumps(key)} is missing; the record has {sorted(row)}")
    value = row[key]
    if numbers and isinstance(value, int | float) and not isinstance(value, bool):
        value = _spell_number(value, key)
    if not isinstance(value, str):
        raise ValueError(f'"{key}" must be text, it is {kind_of(value)}')
    if not value.strip():
        raise ValueError(f'"{key}" is empty')
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f'"{key}" holds a lone surrogate and is no valid text') from None
    return value


def _spell_number(value: float, key: str) -> str:
    """Returns the decimal digits of ``value``: no verifier takes 1e-05 for a number."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f'"{key}"={value} is no number; write the answer itself')
    try:
        return format(Decimal(repr(value)), "f")
    except ValueError:  # repr of an integer with more than 4,300 digits, which Parquet may hold
        raise ValueError(f'"{key}" is an integer of more than 4,300 digits; write it as text') from None


def _parse_id(value: Any, content_id: int) -> int:
    if value is None:
        return content_id
    if isinstance(value, str) and value.strip():
        return stable_id(value)
    if isinstance(value, int) and not isinstance(value, bool):
        if 0 <= value < _MAX_ID:
            return value
        raise ValueError(f'"id"={value} is outside 0 .. 2^64 - 1; use a text id, it is hashed')
    raise ValueError(f'"id" must be a whole number or a non-empty text, it is {kind_of(value)}')


def _check_owner(owner: tuple[str, Record], record: Record) -> None:
    where, first = owner
    if (first.problem, first.answer) != (record.problem, record.answer):
        raise ValueError(f'"id" is already that of another problem at {where}; the difficulty ledger is keyed by it')

"""Turns a ``SourceSection`` into problem records: JSONL and Parquet files, sets of the hub, and procedural sets.

A record is what a file says, checked and given a stable id (data/records.py); it holds no token ids (data/prompts.py
makes those).

This file does NOT decide which verifier exists (rewards/registry.py) or in which order records are used
(data/prompts.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from aer_megatron.data import countdown, procedural
from aer_megatron.data.hub import dataset_files
from aer_megatron.data.records import Record, Rules, parse_record, stable_id
from aer_megatron.data.rows import read_rows
from aer_megatron.data.skipped import OnSkip, ignore
from aer_megatron.options.data import SourceSection


class LoadedRecords(NamedTuple):
    records: tuple[Record, ...]
    num_skipped: int


def load_records(
    source: SourceSection,
    *,
    on_bad_record: Literal["error", "skip"],
    default_verifier: str,
    may_name: Callable[[str], bool],
    on_skip: OnSkip = ignore,
) -> LoadedRecords:
    """Returns the records of ``source``, each with an answer, and how many bad ones were skipped.

    What a record of a file or of the hub may hold: data/records.py. Records without a verifier get
    ``default_verifier``; procedural sets name their own. A name is code to run, so a record may give one only if it is
    the default or ``may_name`` says so. ``on_skip`` is told of every record that is skipped.

    Raises:
        ValueError: a malformed record (file, line and reason) with ``on_bad_record="error"``; a missing or
            empty file; a set that the hub does not give; an unknown procedural set or option.
        RuntimeError: the hub cannot be reached (see ``dataset_files``).
    """
    if source.task is None:
        return _load_rows(source, on_bad_record, Rules("answer", default_verifier, may_name), on_skip)
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
            f"sft.source.task={source.task!r} cannot answer itself; use task='countdown', or a path to a file whose "
            'records have a "response"'
        )
    rules = Rules("response", "", lambda name: True)  # none of the verifiers is called
    return _load_rows(source, on_bad_record, rules, on_skip)


def _procedural_record(problem: str, answer: str, verifier: str, metadata: Mapping[str, Any]) -> Record:
    return Record(stable_id(problem, answer), problem, answer, verifier, None, metadata)


def _load_rows(
    source: SourceSection, on_bad_record: Literal["error", "skip"], rules: Rules, on_skip: OnSkip
) -> LoadedRecords:
    files = _files(source)
    records: list[Record] = []
    owners: dict[int, tuple[str, Record]] = {}
    first_reason, num_skipped = "", 0
    for path, (where, load) in ((file, row) for file in files for row in read_rows(file)):
        try:
            record = parse_record(load(), rules)
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
        raise ValueError(f"path={str(files[0])!r} holds no records ({detail}); give a file with at least one")
    return LoadedRecords(tuple(records), num_skipped)


def _files(source: SourceSection) -> list[Path]:
    if source.dataset is None or source.split is None:
        return [Path(source.path or "")]
    return dataset_files(source.dataset, split=source.split, subset=source.subset)


def _check_owner(owner: tuple[str, Record], record: Record) -> None:
    where, first = owner
    if (first.prompt, first.answer) != (record.prompt, record.answer):
        raise ValueError(f'"id" is already that of another problem at {where}; the difficulty ledger is keyed by it')

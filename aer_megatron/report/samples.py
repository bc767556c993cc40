"""samples/: what the policy wrote, with verdicts and numbers per token; Parquet, one row per completion.

    RUN/samples/step_00000012.rank_00000.0.parquet       the rows of a rank from step 12 on, until the next file begins

A rank writes the groups that it generated itself, so nothing travels between ranks; the reader goes through all files.
A file appears whole or not at all. Writing is done by a thread of its own. What cannot be written (a full disk) is lost
and said once: samples never end a run.

This file does NOT choose what is kept or know where the numbers come from.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

SAMPLES_FOLDER = "samples"
_LOG = logging.getLogger(__name__)
_FLUSH_S = 30.0  # a live run's samples are this old at most
_MOST_WAITING = 64  # files; beyond it rows are dropped: the disk is slower than the run
_MOST_BYTES = 2**31  # of a row group, uncompressed: what no writer of ours makes

_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("set", pa.string()),
        ("prompt_id", pa.uint64()),
        ("group", pa.int32()),
        ("prompt", pa.string()),
        ("answer", pa.string()),
        ("completion", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("sampled", pa.list_(pa.bool_())),
        ("token_ends", pa.list_(pa.int32())),
        ("reward", pa.float64()),
        ("reason", pa.string()),
        ("advantage", pa.float64()),
        ("difficulty", pa.float64()),
        ("entropy_weight", pa.float64()),
        ("logprob", pa.list_(pa.float16())),
        ("token_entropy", pa.list_(pa.float16())),
        ("policy_version_min", pa.int64()),
        ("policy_version_max", pa.int64()),
        ("truncated", pa.bool_()),
    ]
)
_LISTS = tuple(field.name for field in _SCHEMA if pa.types.is_list(field.type))
_OPTIONAL = ("sampled", "advantage", "difficulty", "entropy_weight", "token_entropy")


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """One completion. ``None`` is what its set does not have: evaluation has no advantage, difficulty or entropies."""

    step: int
    set: str  # "train", or the name of an evaluation set
    prompt_id: int
    group: int  # number of its group in the batch, or in the rank's share of an evaluation set
    prompt: str  # as the model read it
    answer: str
    completion: str
    token_ids: tuple[int, ...]
    sampled: tuple[bool, ...] | None  # which tokens the policy sampled; None: all
    token_ends: tuple[int, ...]  # where the text of each token ends in ``completion``
    reward: float
    reason: str
    advantage: float | None
    difficulty: float | None  # d(q), before normalisation
    entropy_weight: float | None  # the coefficient that the loss gave its tokens' entropy
    logprob: tuple[float, ...]  # of the sampled tokens, nats: by the trainer in training, by the engine in evaluation
    token_entropy: tuple[float, ...] | None  # of the sampled tokens, nats
    policy_version_min: int
    policy_version_max: int
    truncated: bool


MakeRows = Callable[[], Sequence[Sample]]


class SampleWriter:
    """Writes the samples of one rank into ``folder``/samples, beside the run; a context manager that ends it.

    Samples of an earlier launch stay; call ``truncate_samples`` before the first ``write``.
    """

    def __init__(self, folder: str | Path, *, rank: int) -> None:
        self._folder = Path(folder) / SAMPLES_FOLDER
        self._rank = rank
        self._rows: list[MakeRows] = []
        self._flushed = time.monotonic()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="samples")
        self._under_way: list[Future[None]] = []
        self._complained = False

    def write(self, rows: MakeRows) -> None:
        """Keeps rows for the next file, which is begun at the latest some 30 s after the last one.

        ``rows`` is called beside the run: what it takes to make them is not waited for.
        """
        self._rows.append(rows)
        if time.monotonic() - self._flushed > _FLUSH_S:
            self._begin_file()

    def flush(self) -> None:
        """Waits until everything is on disk that was written so far, as far as there is room."""
        self._begin_file()
        wait(self._under_way)
        self._look_at_what_is_done()

    def _begin_file(self) -> None:
        rows, self._rows, self._flushed = self._rows, [], time.monotonic()
        self._look_at_what_is_done()
        if len(self._under_way) >= _MOST_WAITING:
            self._complain("the disk is slower than the run")
        elif rows:
            self._under_way.append(self._thread.submit(self._write_file, rows))

    def _look_at_what_is_done(self) -> None:
        for future in [future for future in self._under_way if future.done()]:
            self._under_way.remove(future)
            if (error := future.exception()) is not None:
                self._complain(f"{type(error).__name__}: {error}")

    def _write_file(self, made: Sequence[MakeRows]) -> None:
        rows = [row for rows in made for row in rows()]
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"step_{rows[0].step:08d}.rank_{self._rank:05d}"
        path = next(path for n in itertools.count() if not (path := self._folder / f"{name}.{n}.parquet").exists())
        columns = {field.name: [getattr(row, field.name) for row in rows] for field in _SCHEMA}
        _write_table(pa.table(columns, schema=_SCHEMA), path)

    def _complain(self, why: str) -> None:
        if not self._complained:
            self._complained = True
            _LOG.error("samples are lost, the run goes on: %s: %s", self._folder, why)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flush()
        self._thread.shutdown()


def truncate_samples(folder: str | Path, resume_step: int) -> None:
    """Drops the samples of ``resume_step`` and later, of all ranks. A file that is none of samples is set aside."""
    for path in (Path(folder) / SAMPLES_FOLDER).glob(".*.partial"):  # of a killed run
        path.unlink()
    for path in _files(folder):
        try:
            table = pq.read_table(path, schema=_SCHEMA)
            kept = table.filter(pc.less(table["step"], resume_step))
        except (pa.ArrowException, OSError, ValueError) as error:
            _LOG.warning("%s is no file of samples (%s); it is now %s.damaged", path, error, path.name)
            path.replace(path.with_name(f"{path.name}.damaged"))
            continue
        if len(kept) == 0:
            path.unlink()
        elif len(kept) < len(table):
            _write_table(kept, path)


def read_samples(
    folder: str | Path, *, steps: range | None = None, sets: Collection[str] | None = None
) -> Iterator[Sample]:
    """Yields the samples of the run in ``folder`` by the step that a file begins with; some rows at a time in memory.

    Args:
        folder: the run's folder.
        steps, sets: what is wanted; None is everything.

    Raises:
        ValueError: the run has no samples, or a file is damaged or of another kind.
    """
    files = _files(folder)
    if not files:
        raise ValueError(
            f"{folder} holds no samples ({SAMPLES_FOLDER}/*.parquet); give the output_dir of a run with "
            "report.samples > 0"
        )
    for path in files:
        try:
            with pq.ParquetFile(path) as file:
                if not file.schema_arrow.equals(_SCHEMA):
                    raise ValueError("its columns are others")
                for number in range(file.num_row_groups):
                    if file.metadata.row_group(number).total_byte_size > _MOST_BYTES:
                        raise ValueError("a row group is larger than any of a run")
                for batch in file.iter_batches(batch_size=64):
                    yield from _samples(batch.to_pylist(), steps, sets)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise ValueError(f"{path} is no file of samples ({error}); move it away") from None


def _samples(rows: Sequence[dict[str, Any]], steps: range | None, sets: Collection[str] | None) -> Iterator[Sample]:
    for row in rows:
        for name, value in row.items():
            if (value is None and name not in _OPTIONAL) or (isinstance(value, list) and None in value):
                raise ValueError(f"a row has no {name}, or one with a gap")
        if (steps is None or row["step"] in steps) and (sets is None or row["set"] in sets):
            for name in _LISTS:
                row[name] = None if row[name] is None else tuple(row[name])
            yield Sample(**row)


def _files(folder: str | Path) -> list[Path]:
    return sorted((Path(folder) / SAMPLES_FOLDER).glob("*.parquet"))


def _write_table(table: pa.Table, path: Path) -> None:
    """Writes a file that appears under its name as a whole."""
    work = path.with_name(f".{path.name}.partial")
    try:
        pq.write_table(table, work, compression="zstd")
        os.replace(work, path)
    except BaseException:
        work.unlink(missing_ok=True)
        raise

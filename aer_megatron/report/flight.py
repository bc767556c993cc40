"""flight.jsonl: the flight recorder of a run, one JSON object per step, from which any controller can be replayed.

Numbers are exact: floats are written by ``repr``, what is not finite as "NaN", "Infinity" or "-Infinity" (in quotes:
the file stays plain JSON), and the accuracy per prompt as base64 of little-endian float64. The file is appended to like
metrics.jsonl and cut at the resume step like it.

This file does NOT compute what is recorded (algo/flight.py).
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from aer_megatron.algo.controller import Observation, state_from_dict, state_to_dict
from aer_megatron.algo.flight import (
    BUCKETS,
    ENTROPY_EDGES,
    BatchProfile,
    BucketSums,
    FlightRecord,
    GradientGeometry,
    difficulty_buckets,
)
from aer_megatron.files.json_input import kind_of
from aer_megatron.files.whole_files import LineFile, replace_file
from aer_megatron.report.writer import split_lines
from aer_megatron.types import Float64Array, Int64Array

FLIGHT_FILE = "flight.jsonl"
FORMAT = 1
_WORDS = ("NaN", "Infinity", "-Infinity")
_FIELDS = {"step", "observation", "state", "coefficient", "successes", "counts", "ledger_accuracy", "buckets"} | {
    "entropy_by_difficulty", "entropy_by_position", "gradients", "clip_low", "clip_high"
}  # fmt: skip


class FlightWriter:
    """Appends one record per step to ``folder``/flight.jsonl.

    Records of an earlier launch stay; call ``truncate_from(resume_step)`` before the first ``write``.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / FLIGHT_FILE
        self._lines = LineFile(self.path)

    def write(self, record: FlightRecord) -> None:
        """Appends one step and hands it to the operating system before it returns; on a full disk see ``LineFile``."""
        self._lines.append(json.dumps(_to_table(record), separators=(",", ":"), allow_nan=False))

    def close(self) -> None:
        """Writes the records for which there was no room; raises RuntimeError where there is none yet."""
        self._lines.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes; an error that ends the run is not hidden by another."""
        with suppress(RuntimeError, OSError) if kind else nullcontext():
            self.close()

    def truncate_from(self, resume_step: int) -> None:
        """Drops the records of ``resume_step`` and later, and a half-written last line, in one atomic rename.

        Raises:
            ValueError: a line before the last one is not a JSON object with a step.
        """
        if self.path.exists():
            kept = [line for step, line in split_lines(self.path) if step < resume_step]
            replace_file(self.path, "".join(f"{line}\n" for line in kept))


def read_flight(folder: str | Path) -> list[FlightRecord]:
    """Returns the records of a run in order; a half-written last line is left out.

    Raises:
        ValueError: the run has no recording, or a line before the last one is malformed or of another format.
    """
    path = Path(folder) / FLIGHT_FILE
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no recording ({FLIGHT_FILE}): give the output_dir of a run made with "
            "report.flight_recorder=true; a resumed run records from its resume step on"
        )
    return [_from_table(json.loads(line), path) for _, line in split_lines(path)]


def _to_table(record: FlightRecord) -> dict[str, Any]:
    profile = record.profile
    return {
        "step": record.step,
        "format": FORMAT,
        "observation": {name: _from_float(value) for name, value in asdict(record.observation).items()},
        "state": state_to_dict(record.state),
        "coefficient": _from_float(record.coefficient),
        "successes": record.successes_P.tolist(),
        "counts": record.counts_P.tolist(),
        "ledger_accuracy": base64.b64encode(record.ledger_accuracy_P.astype("<f8").tobytes()).decode("ascii"),
        "buckets": {
            name.removesuffix("_D"): [_from_float(value) for value in array.tolist()]
            for name, array in _columns(profile.buckets).items()
        },
        "entropy_by_difficulty": profile.entropy_by_difficulty_DK.tolist(),
        "entropy_by_position": profile.entropy_by_position_QK.tolist(),
        "gradients": None
        if profile.gradients is None
        else {name: _from_float(value) for name, value in asdict(profile.gradients).items()},
        "clip_low": list(record.clip_low),
        "clip_high": list(record.clip_high),
    }


def _from_table(table: Mapping[str, Any], path: Path) -> FlightRecord:
    if table.get("format") != FORMAT:
        raise ValueError(
            f"{path} has records of format {str(table.get('format'))[:20]}, this version reads {FORMAT}; replay with "
            "the version that made the run (run.json names it)"
        )
    try:
        return _record(table)
    except ValueError as error:
        raise ValueError(f"{path}, step {table.get('step')} is not a whole record ({error}); repair it") from None


def _record(table: Mapping[str, Any]) -> FlightRecord:
    """Raises ValueError that names a field which is missing, of another type or shape, or out of its range."""
    if missing := sorted(_FIELDS - table.keys()):
        raise ValueError(f"{missing[0]} is missing")
    counts_P = _counts(table["counts"], "counts")
    successes_P = _counts(table["successes"], "successes", len(counts_P))
    difficulty_buckets(successes_P, counts_P)  # refuses counts that no group has
    buckets = _object(table["buckets"], "buckets")
    columns: dict[str, Any] = {
        item.name: (_counts if item.type == "Int64Array" else _reals)(
            buckets.get(item.name.removesuffix("_D")), f"buckets.{item.name.removesuffix('_D')}", len(BUCKETS)
        )
        for item in fields(BucketSums)
    }
    gradients = table["gradients"]
    return FlightRecord(
        step=table["step"],
        observation=Observation(**_floats(table["observation"], "observation", Observation)),
        state=state_from_dict(_object(table["state"], "state")),
        coefficient=_real(table["coefficient"], "coefficient"),
        successes_P=successes_P,
        counts_P=counts_P,
        ledger_accuracy_P=_to_array(table["ledger_accuracy"], len(counts_P)),
        profile=BatchProfile(
            buckets=BucketSums(**columns),
            entropy_by_difficulty_DK=_histogram(table["entropy_by_difficulty"], "entropy_by_difficulty"),
            entropy_by_position_QK=_histogram(table["entropy_by_position"], "entropy_by_position"),
            gradients=None
            if gradients is None
            else GradientGeometry(**_floats(gradients, "gradients", GradientGeometry, may_be_none="cosine")),
        ),
        clip_low=_pair(table["clip_low"], "clip_low"),
        clip_high=_pair(table["clip_high"], "clip_high"),
    )


def _columns(sums: BucketSums) -> dict[str, np.ndarray[Any, Any]]:
    return {item.name: getattr(sums, item.name) for item in fields(sums)}


def _from_float(value: Any) -> Any:
    """Returns ``value``, or its JavaScript name as a string where JSON has no number for it."""
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _real(value: Any, where: str) -> float:
    if isinstance(value, str) and value in _WORDS:
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) >= 2**1023:
        raise ValueError(f"{where} must be a number, it is {kind_of(value)}")
    return float(value)


def _reals(values: Any, where: str, length: int) -> Float64Array:
    return np.array([_real(value, where) for value in _list(values, where, length)], dtype=np.float64)


def _counts(values: Any, where: str, length: int | None = None) -> Int64Array:
    for value in _list(values, where, length):
        if type(value) is not int or not 0 <= value < 2**63:
            raise ValueError(f"{where} must hold integers from 0 to 2^63 - 1, not {str(value)[:40]}")
    return np.array(values, dtype=np.int64)


def _histogram(rows: Any, where: str) -> Int64Array:
    num_bins = len(ENTROPY_EDGES) - 1
    counts = [_counts(row, f"{where}[{index}]", num_bins) for index, row in enumerate(_list(rows, where, None))]
    return np.array(counts, dtype=np.int64).reshape(len(counts), num_bins)


def _list(values: Any, where: str, length: int | None) -> list[Any]:
    if not isinstance(values, list):
        raise ValueError(f"{where} must be a list, it is {kind_of(values)}")
    if length is not None and len(values) != length:
        raise ValueError(f"{where} must have {length} items, it has {len(values)}")
    return values


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object, it is {kind_of(value)}")
    return value


def _floats(table: Any, where: str, kind: type[Any], *, may_be_none: str = "") -> dict[str, Any]:
    """Returns the fields of the dataclass ``kind`` in ``table``, all of them floats."""
    known = {item.name: item.default is MISSING for item in fields(kind)}
    values = _object(table, where)
    if unknown := sorted(values.keys() - known.keys()):
        raise ValueError(f"{where}.{unknown[0][:40]} is unknown")
    if absent := sorted(name for name, needed in known.items() if needed and name not in values):
        raise ValueError(f"{where}.{absent[0]} is missing")
    return {
        name: None if value is None and name == may_be_none else _real(value, f"{where}.{name}")
        for name, value in values.items()
    }


def _to_array(text: Any, length: int) -> Float64Array:
    try:
        raw = base64.b64decode(text if isinstance(text, str) else "?", validate=True)
    except ValueError:
        raise ValueError("ledger_accuracy must be base64 of float64") from None
    if len(raw) != 8 * length:
        raise ValueError(f"ledger_accuracy must hold {length} float64, it has {len(raw)} bytes")
    return np.frombuffer(raw, dtype="<f8").astype(np.float64)


def _pair(values: Any, where: str) -> tuple[float, float]:
    low, high = (_real(value, where) for value in _list(values, where, 2))
    return low, high

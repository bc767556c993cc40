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
from dataclasses import asdict, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from aer_megatron.algo.controller import Observation, state_from_dict, state_to_dict
from aer_megatron.algo.flight import BatchProfile, BucketSums, FlightRecord, GradientGeometry
from aer_megatron.report.files import LineFile, replace_file
from aer_megatron.report.writer import split_lines
from aer_megatron.types import Float64Array

FLIGHT_FILE = "flight.jsonl"
FORMAT = 1


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
            f"{path} has records of format {table.get('format')}, this version reads {FORMAT}; replay with the version "
            "that made the run (run.json names it)"
        )
    try:
        gradients = table["gradients"]
        buckets = {item.name: table["buckets"][item.name.removesuffix("_D")] for item in fields(BucketSums)}
        return FlightRecord(
            step=table["step"],
            observation=Observation(**{name: _to_float(value) for name, value in table["observation"].items()}),
            state=state_from_dict(table["state"]),
            coefficient=_to_float(table["coefficient"]),
            successes_P=np.array(table["successes"], dtype=np.int64),
            counts_P=np.array(table["counts"], dtype=np.int64),
            ledger_accuracy_P=_to_array(table["ledger_accuracy"]),
            profile=BatchProfile(
                buckets=BucketSums(**{name: _bucket_array(values) for name, values in buckets.items()}),
                entropy_by_difficulty_DK=np.array(table["entropy_by_difficulty"], dtype=np.int64),
                entropy_by_position_QK=np.array(table["entropy_by_position"], dtype=np.int64),
                gradients=None
                if gradients is None
                else GradientGeometry(**{name: _to_float(value) for name, value in gradients.items()}),
            ),
            clip_low=_pair(table["clip_low"]),
            clip_high=_pair(table["clip_high"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}, step {table.get('step')} is not a whole record ({error}); repair it") from None


def _columns(sums: BucketSums) -> dict[str, np.ndarray[Any, Any]]:
    return {item.name: getattr(sums, item.name) for item in fields(sums)}


def _from_float(value: Any) -> Any:
    """Returns ``value``, or its JavaScript name as a string where JSON has no number for it."""
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _to_float(value: Any) -> Any:
    return float(value) if isinstance(value, str) else value


def _bucket_array(values: list[Any]) -> np.ndarray[Any, Any]:
    whole = all(isinstance(value, int) for value in values)
    return np.array([_to_float(value) for value in values], dtype=np.int64 if whole else np.float64)


def _to_array(text: str) -> Float64Array:
    return np.frombuffer(base64.b64decode(text), dtype="<f8").astype(np.float64)


def _pair(values: list[float]) -> tuple[float, float]:
    return values[0], values[1]

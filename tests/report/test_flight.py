"""flight.jsonl: exact, plain JSON, and the same after a kill and a resume."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aer_megatron.algo.entropy_rules.aer import Aer
from aer_megatron.algo.flight import FlightRecord, GradientGeometry
from aer_megatron.report.flight import FLIGHT_FILE, FlightWriter, read_flight
from tests.support.flights import flight_records

OPTIONS = Aer(update="pi", k_p=0.3, tau=0.9)


def flat(value: Any) -> Any:
    """Returns a record as nested tuples in which floats are their bits and arrays carry their type."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return tuple((item.name, flat(getattr(value, item.name))) for item in dataclasses.fields(value))
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, tuple):
        return tuple(map(flat, value))
    return value.hex() if isinstance(value, float) and math.isfinite(value) else repr(value)


def write(folder: Path, records: list[FlightRecord]) -> None:
    writer = FlightWriter(folder)
    for record in records:
        writer.write(record)


def test_records_come_back_with_the_same_bits(tmp_path: Path) -> None:
    records = flight_records(OPTIONS, 6)
    without = dataclasses.replace(records[0].profile, gradients=None)
    records[0] = dataclasses.replace(records[0], profile=without)
    write(tmp_path, records)
    assert list(map(flat, read_flight(tmp_path))) == list(map(flat, records))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 5e-324, -0.0, 0.1, 1e300])
def test_every_float_survives_and_the_file_is_plain_json(tmp_path: Path, value: float) -> None:
    record = flight_records(OPTIONS, 1)[0]
    buckets = dataclasses.replace(record.profile.buckets, entropy_sum_D=np.array([value, 0.0, 1.5, value]))
    geometry = GradientGeometry(value, 1.0, None)
    record = dataclasses.replace(
        record,
        observation=dataclasses.replace(record.observation, entropy_sum=value),
        profile=dataclasses.replace(record.profile, buckets=buckets, gradients=geometry),
    )
    write(tmp_path, [record])

    def refuse(constant: str) -> Any:
        raise AssertionError(f"{constant} is not JSON")

    json.loads((tmp_path / FLIGHT_FILE).read_text(), parse_constant=refuse)
    assert flat(read_flight(tmp_path)[0]) == flat(record)


@pytest.mark.parametrize("tail", ["", '{"step":7,"observation":{"entr', "{"])
@pytest.mark.parametrize("resume_step", [0, 3, 7, 9])
def test_a_resumed_recording_equals_the_one_of_a_run_never_killed(tmp_path: Path, tail: str, resume_step: int) -> None:
    records = flight_records(OPTIONS, 10)
    write(tmp_path / "straight", records)
    write(tmp_path / "killed", records[:7])
    with (tmp_path / "killed" / FLIGHT_FILE).open("a") as file:
        file.write(tail)
    resumed = FlightWriter(tmp_path / "killed")
    resumed.truncate_from(resume_step)
    for record in records[min(resume_step, 7) :]:
        resumed.write(record)
    straight = (tmp_path / "straight" / FLIGHT_FILE).read_bytes()
    assert (tmp_path / "killed" / FLIGHT_FILE).read_bytes() == straight


def test_a_half_written_last_line_is_left_out_and_damage_before_it_is_named(tmp_path: Path) -> None:
    records = flight_records(OPTIONS, 3)
    write(tmp_path, records)
    file = tmp_path / FLIGHT_FILE
    text = file.read_text()
    file.write_text(text[:-30])
    assert [record.step for record in read_flight(tmp_path)] == [0, 1]
    for damage, message in (
        (('\n{"step":1', '\n{"stop":1'), "line 2"),
        (('"integral"', '"intergal"'), "step 0 is not a whole record .controller state lacks integral"),
    ):
        file.write_text(text.replace(*damage))
        with pytest.raises(ValueError, match=message):
            read_flight(tmp_path)
    file.write_text(text.replace('"coefficient"', '"coeficient"'))
    with pytest.raises(ValueError, match="step 0 is not a whole record"):
        read_flight(tmp_path)
    file.write_text(text.replace('"format":1', '"format":2'))
    with pytest.raises(ValueError, match="format 2, this version reads 1"):
        read_flight(tmp_path)


def test_a_run_without_a_recording_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"report\.flight_recorder=true"):
        read_flight(tmp_path)
    FlightWriter(tmp_path / "nowhere").truncate_from(0)  # nothing to cut, nothing to make
    assert not (tmp_path / "nowhere").exists()


def test_a_record_is_compact(tmp_path: Path) -> None:
    """Histograms and per-prompt values of 6 prompts in less than the room of a metrics line of the quick start."""
    write(tmp_path, flight_records(OPTIONS, 1))
    assert (tmp_path / FLIGHT_FILE).stat().st_size < 2000

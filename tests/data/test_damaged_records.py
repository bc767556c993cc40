"""flight.jsonl, metrics.jsonl and weights with any value in any field: read, or a ValueError naming the file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from aer_megatron.algo.entropy_rules.aer import Aer
from aer_megatron.algo.flight import replay
from aer_megatron.convert.hf_folder import HFFolder
from aer_megatron.report.flight import FLIGHT_FILE, FlightWriter, read_flight
from aer_megatron.report.writer import METRICS_FILE, read_metrics
from tests.support.flights import flight_records
from tests.support.json_values import JSON

OPTIONS = Aer(update="pi", k_p=0.3, tau=0.9)
ANY = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("flight")
    writer = FlightWriter(folder)
    writer.write(flight_records(OPTIONS, 1)[0])
    found: dict[str, Any] = json.loads((folder / FLIGHT_FILE).read_text())
    return found


FIELDS = ["step", "format", "observation", "state", "coefficient", "successes", "counts", "ledger_accuracy", "buckets"]
FIELDS += ["entropy_by_difficulty", "entropy_by_position", "gradients", "clip_low", "clip_high", "state.alpha"]
FIELDS += ["observation.entropy_sum", "observation.more", "buckets.tokens", "buckets.entropy_sum", "gradients.cosine"]
FIELDS += ["gradients.policy_norm", "state.step", "state.initial_entropy"]


def changed(table: dict[str, Any], field: str, value: Any) -> dict[str, Any]:
    copy: dict[str, Any] = json.loads(json.dumps(table))
    node = copy
    *parents, leaf = field.split(".")
    for part in parents:
        node = node[part]
    node[leaf] = value
    return copy


@ANY
@given(field=st.sampled_from(FIELDS), value=JSON)
def test_a_flight_record(tmp_path: Path, record: dict[str, Any], field: str, value: Any) -> None:
    lines = [json.dumps(changed(record, field, value)), json.dumps(record | {"step": 1})]
    (tmp_path / FLIGHT_FILE).write_text("".join(f"{line}\n" for line in lines))
    try:
        records = read_flight(tmp_path)
    except ValueError as error:
        assert FLIGHT_FILE in str(error)
        return
    if records[0].step == 0:
        replay(records, OPTIONS, recorded=OPTIONS)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("state", [1]),
        ("observation", 3.5),
        ("successes", [10**30]),
        ("counts", [10**30]),
        ("counts", [0]),
        ("clip_low", []),
        ("clip_high", [1, "x"]),
        ("gradients", "x"),
        ("entropy_by_difficulty", [[1]]),
        ("ledger_accuracy", "AAAA"),
        ("buckets", {"tokens": [1, 2, 3, 4]}),
        ("coefficient", None),
    ],
)
def test_a_flight_record_names_the_field(tmp_path: Path, record: dict[str, Any], field: str, value: Any) -> None:
    (tmp_path / FLIGHT_FILE).write_text(json.dumps(changed(record, field, value)) + "\n{}\n")
    with pytest.raises(ValueError, match=FLIGHT_FILE):
        read_flight(tmp_path)


def test_a_flight_record_that_lacks_a_field_names_it(tmp_path: Path, record: dict[str, Any]) -> None:
    for field in sorted(record.keys() - {"step", "format"}):
        line = json.dumps({key: value for key, value in record.items() if key != field})
        (tmp_path / FLIGHT_FILE).write_text(line + "\n")
        with pytest.raises(ValueError, match=f"{FLIGHT_FILE}, step 0 is not a whole record .{field} is missing"):
            read_flight(tmp_path)


@ANY
@given(step=JSON, loss=JSON)
def test_a_metrics_line(tmp_path: Path, step: Any, loss: Any) -> None:
    (tmp_path / METRICS_FILE).write_text(json.dumps({"step": step, "train/loss": loss}) + '\n{"step": 1}\n')
    try:
        first = read_metrics(tmp_path / METRICS_FILE)[0]
    except ValueError as error:
        assert METRICS_FILE in str(error)
    else:
        assert type(first["step"]) is int and not isinstance(first["train/loss"], dict | list)


@pytest.mark.parametrize("line", ['{"step": Infinity}', '{"step": true}', '{"step": -1}', "[1]", "3", '{"a":' * 9999])
def test_a_metrics_line_without_a_step_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / METRICS_FILE).write_text(line + '\n{"step": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1 is not the record of a step"):
        read_metrics(tmp_path / METRICS_FILE)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"a": torch.zeros(2)}, folder / "part.safetensors")
    shutil.copy(folder / "part.safetensors", tmp_path / "outside.safetensors")
    return folder


@ANY
@given(table=JSON | st.fixed_dictionaries({"weight_map": JSON | st.dictionaries(st.sampled_from(["a", "b"]), JSON)}))
def test_a_weight_index(weights: Path, table: Any) -> None:
    (weights / "model.safetensors.index.json").write_text(json.dumps(table))
    try:
        HFFolder(weights)
    except ValueError as error:
        assert str(weights) in str(error)


@pytest.mark.parametrize("file", ["../outside.safetensors", "x" * 5000, "/etc/passwd", "a.safetensors/../x", None, 3])
def test_a_weight_index_names_files_of_its_folder(weights: Path, file: Any) -> None:
    (weights / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(ValueError, match="is not a safetensors index"):
        HFFolder(weights)


@given(raw=st.binary(max_size=64) | st.binary(max_size=64).map(lambda b: len(b).to_bytes(8, "little") + b))
@ANY
def test_a_safetensors_file(weights: Path, raw: bytes) -> None:
    (weights / "model.safetensors").write_bytes(raw)
    try:
        folder = HFFolder(weights)
        for name in folder.names():
            folder.get(name)
    except ValueError as error:
        assert "model.safetensors" in str(error)

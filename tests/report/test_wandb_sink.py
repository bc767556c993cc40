"""Weights & Biases without a network: what an offline run holds, read from its own files."""

from __future__ import annotations

from pathlib import Path

import pytest

from aer_megatron.config import Config
from aer_megatron.report.reporter import Reporter
from aer_megatron.report.samples import SampleWriter
from tests.report.test_samples import sample
from tests.support.wandb_files import history

pytestmark = pytest.mark.processes  # W&B's own, which writes the files
wandb = pytest.importorskip("wandb", reason="needs the extra wandb")

SECRET = "hf_abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def train(folder: Path, steps: range, *, base: float) -> None:
    config = Config.from_table(
        {
            "run": {"name": "the name"},
            "model": {"path": "base"},
            "data": {"train": {"task": "countdown"}},
            "sglang": {"environment": {"HF_TOKEN": SECRET}},
            "report": {"sinks": ["wandb"], "sink_options": {"wandb": {"project": "p", "tags": ["a"]}}},
        }
    )
    with Reporter.open(config, folder=folder, num_steps=9, start_step=steps.start) as reporter:
        for step in steps:
            alarm = "collapse at step 1" if step == 1 else None
            reporter.step({"step": step, "reward/mean": base + step, "aer/held": False, "aer/alarm": alarm})
        with SampleWriter(folder, rank=0) as writer:
            writer.write(lambda: [sample(steps.stop - 1, completion="the text of the policy")])
    wandb.teardown()  # waits for the process that writes the files


def test_a_resumed_run_is_one_run_with_every_step_once(tmp_path: Path) -> None:
    train(tmp_path, range(4), base=0.25)
    train(tmp_path, range(2, 6), base=8.25)
    rows = history(tmp_path)
    assert [step for _, step, _ in rows] == [0, 1, 2, 3, 4, 5]
    assert {run_id for run_id, *_ in rows} == {(tmp_path / "run_id").read_text()}
    # what was sent cannot be taken back: steps 2 and 3 are those of the first launch
    assert [values["reward/mean"] for *_, values in rows] == [0.25, 1.25, 2.25, 3.25, 12.25, 13.25]
    assert [values.get("aer/alarm") for *_, values in rows] == [None, "collapse at step 1", None, None, None, None]
    assert [step for _, step, values in rows if any(name.startswith("report") for name in values)] == [
        3,
        5,
    ]  # a picture at the end of each launch
    tables = list(tmp_path.glob("wandb/offline-run-*/files/media/table/samples_*.json"))
    assert len(tables) == 2 and all("the text of the policy" in table.read_text() for table in tables)
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/report_*.png"))) == 2


def test_a_run_that_begins_anew_is_another_one(tmp_path: Path) -> None:
    for _ in range(2):
        train(tmp_path, range(1), base=0.5)
    rows = history(tmp_path)
    assert [step for _, step, _ in rows] == [0, 0]
    assert rows[0][0] != rows[1][0]


def test_no_secret_and_no_command_line_is_in_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["aer", f"--sglang.environment.HF_TOKEN={SECRET}"])
    train(tmp_path, range(1), base=0.5)
    files = [file for file in (tmp_path / "wandb").rglob("*") if file.is_file()]
    assert any(file.suffix == ".wandb" and b"HF_TOKEN" in file.read_bytes() for file in files)  # its masked value
    assert [file for file in files if SECRET.encode() in file.read_bytes()] == []

"""MLflow with a store in a local SQLite file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aer_megatron.config import Config
from aer_megatron.report.reporter import Reporter
from aer_megatron.report.samples import SampleWriter
from tests.report.test_samples import sample

pytest.importorskip("mlflow", reason="needs the extra mlflow")

SECRET = "hf_abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One for all tests: its tables take two seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where MLflow puts artifacts of a local store


def train(
    folder: Path, database: str, steps: range, *, base: float = 0.25, tau: float = 0.5, fails: bool = False
) -> None:
    config = Config.from_table(
        {
            "run": {"name": "the name"},
            "model": {"path": "base"},
            "data": {"train": {"task": "countdown"}},
            "algo": {"entropy": {"tau": tau}},
            "sglang": {"environment": {"HF_TOKEN": SECRET}},
            "report": {
                "sinks": ["mlflow"],
                "sink_options": {"mlflow": {"tracking_uri": database, "experiment": folder.name}},
            },
        }
    )
    with Reporter.open(config, folder=folder, num_steps=9, start_step=steps.start) as reporter:
        for step in steps:
            alarm = "collapse at step 1" if step == 1 else None
            reporter.step({"step": step, "reward/mean": base + step, "eval/x/pass@8": 0.0, "aer/alarm": alarm})
        with SampleWriter(folder, rank=0) as writer:
            writer.write(lambda: [sample(steps.stop - 1, completion="the text of the policy")])
        if fails:
            raise KeyError("the run fails")


def runs(folder: Path, database: str) -> tuple[Any, list[Any]]:
    """Returns the client and the runs of the folder's experiment."""
    from mlflow import MlflowClient

    client = MlflowClient(database)
    return client, client.search_runs([client.get_experiment_by_name(folder.name).experiment_id])


def test_a_resumed_run_is_one_run_with_every_step_once(tmp_path: Path, database: str) -> None:
    train(tmp_path, database, range(4))
    train(tmp_path, database, range(2, 6), base=8.25, tau=0.6)  # a changed option, which MLflow refuses to change
    client, (run,) = runs(tmp_path, database)
    points = sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, "reward/mean"))
    # what was sent cannot be taken back: steps 2 and 3 are those of the first launch
    assert points == [(0, 0.25), (1, 1.25), (2, 2.25), (3, 3.25), (4, 12.25), (5, 13.25)]
    assert len(client.get_metric_history(run.info.run_id, "eval/x/pass_at_8")) == 6
    assert (run.info.run_name, run.info.status) == ("the name", "FINISHED")
    assert run.data.tags["aer/alarm"] == "collapse at step 1"
    assert run.data.params["algo.entropy.tau"] == "0.5"
    assert run.data.params["sglang.environment.HF_TOKEN"] == "***"
    assert SECRET not in str(run.to_dictionary())
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["report.png", "samples.json"]
    assert "the text of the policy" in next(tmp_path.rglob("samples.json")).read_text()


def test_a_failed_run_is_marked_and_one_that_begins_anew_is_another(tmp_path: Path, database: str) -> None:
    with pytest.raises(KeyError):
        train(tmp_path, database, range(1), fails=True)
    train(tmp_path, database, range(1))
    _, found = runs(tmp_path, database)
    assert sorted(run.info.status for run in found) == ["FAILED", "FINISHED"]


def test_a_store_that_cannot_be_reached_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RuntimeError, match=r"report\.sinks: 'mlflow' cannot start: .*leave it out of report\.sinks"):
        train(tmp_path, f"sqlite:///{tmp_path}/file/m.db", range(1))

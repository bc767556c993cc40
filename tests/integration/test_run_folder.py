"""The folder of a run: one run at a time, a resume that says what it does, a finished run that is left as it is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from aer_megatron.files.run_lock import RunLock
from tests.support.runs import metric_lines, train, write_run_file

pytestmark = pytest.mark.integration

SMALL = ("--eval.sets={}", "--rollout.prompts_per_step=2", "--report.sinks=[]")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, random_policy: Path) -> Iterator[Path]:
    """A run file whose run has made its two steps."""
    run_file = write_run_file(tmp_path_factory.mktemp("finished"), base=random_policy)
    run_file.write_text(run_file.read_text().replace("num_steps = 6", "num_steps = 2"))
    done = train(run_file, *SMALL)
    assert done.returncode == 0, done.stderr
    yield run_file


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_second_run_in_a_folder_is_refused_on_every_rank(finished: Path) -> None:
    out = finished.parent / "out"
    with RunLock(out / "run.lock", option="", job="SLURM_JOB_ID 12"):
        before = contents(out)
        done = train(finished, *SMALL, "--run.num_steps=3")
        both = train(finished, *SMALL, "--run.num_steps=3", "--parallel.tp=2", ranks=2)
        assert contents(out) == before
    assert done.returncode == 2, done.stderr
    assert both.returncode != 0
    for said in (done.stderr, both.stderr):
        for word in ("run.output_dir=", "in use by another run", "SLURM_JOB_ID 12"):
            assert word in said
    assert "Traceback" not in done.stderr


def test_a_finished_run_says_so_and_stays_as_it_is(finished: Path) -> None:
    before = contents(finished.parent / "out")
    same = train(finished, *SMALL)
    other = train(finished, *SMALL, "--optimizer.lr=0.5", "--algo.entropy.kind=none")
    del before[str(finished.parent / "out" / "run.lock")]
    after = contents(finished.parent / "out")
    assert {file: after[file] for file in before} == before
    assert (same.returncode, other.returncode) == (0, 0)
    for done in (same, other):
        for word in ("is finished", "step_00000002", "nothing was trained", "raise run.num_steps"):
            assert word in done.stdout
    assert "differs" not in same.stdout
    for word in ("optimizer.lr 0.001 -> 0.5", 'algo.entropy.kind "aer" -> "none"'):
        assert word in other.stdout


def test_a_resumed_run_says_where_and_what_is_different(finished: Path, tmp_path: Path) -> None:
    out = finished.parent / "out"
    done = train(finished, *SMALL, "--run.num_steps=3", "--optimizer.lr=0.01")
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("resumed"))
    assert line.startswith(f"resumed at step 2 of {out}/checkpoints/step_00000002; changed: ")
    assert "optimizer.lr 0.001 -> 0.01, run.num_steps 2 -> 3" in line
    assert [row["step"] for row in metric_lines(out)] == [0, 1, 2]
    record = json.loads((out / "run.json").read_text())
    assert [launch["first_step"] for launch in record["launches"]] == [0, 2]
    assert [launch["config"]["optimizer"]["lr"] for launch in record["launches"]] == [0.001, 0.01]
    assert all(launch["time"] and launch["versions"]["torch"] for launch in record["launches"])
    assert record["config"] == record["launches"][1]["config"]

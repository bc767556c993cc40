"""A run on a disk with room for one checkpoint: it goes on, loses no line, and ends saying what it needed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.runs import metric_lines, random_base, train, write_run_file
from tests.support.small_disk import fill, small_disk

pytestmark = pytest.mark.integration

SMALL = ("--eval.sets={}", "--rollout.prompts_per_step=2", "--report.sinks=[]")


def test_the_checkpoint_before_stays_and_the_same_command_goes_on(tmp_path: Path) -> None:
    random_base(tmp_path / "base")
    run_file = write_run_file(tmp_path)
    with small_disk(tmp_path / "out", 64 << 20) as out:
        options = (*SMALL, "--run.checkpoint_every=1", "--run.keep_checkpoints=1")
        done = train(run_file, *options, "--run.num_steps=1")
        assert done.returncode == 0, done.stderr
        filler = fill(out, leave=1 << 20)  # the next checkpoint needs more, lines do not
        done = train(run_file, *options, "--run.num_steps=4")
        assert done.returncode == 1, done.stderr
        assert done.stderr.count("NOT WRITTEN") == 3
        last = done.stderr.strip().splitlines()[-1]
        assert "the checkpoint of step 4, the last of this run, is not written" in last
        assert "step_00000004.tmp-new needs " in last and f"{out / 'checkpoints'} has 1." in last
        assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_00000001"]
        lines = metric_lines(out)
        assert [line["step"] for line in lines] == [0, 1, 2, 3]
        assert [line["checkpoint/failed"] for line in lines] == [0, 0, 1, 2]
        filler.unlink()
        done = train(run_file, *options, "--run.num_steps=4")
        assert done.returncode == 0, done.stderr
        assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_00000004"]
        drop = {"checkpoint/failed": None}
        assert [line | drop for line in metric_lines(out)] == [line | drop for line in lines]

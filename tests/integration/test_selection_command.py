"""Prompt selection through the real command line: prompts are passed over, and a resumed run agrees about which."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.runs import metric_lines, train, write_run_file

pytestmark = pytest.mark.integration

SELECTION = (
    "--eval.sets={}",
    "--data.train.size=16",
    "--algo.ledger.decay=1.0",
    "--algo.selection.kind=skip_decided",
    "--algo.selection.min_attempts=4",
    "--algo.selection.margin=0.3",
    "--algo.selection.confidence=0.5",
    "--algo.selection.exploration=0.3",
)


def test_a_resumed_run_passes_over_the_same_prompts(tmp_path: Path, random_policy: Path) -> None:
    run_file = write_run_file(tmp_path, base=random_policy)
    straight, parted = f"--run.output_dir={tmp_path}/straight", f"--run.output_dir={tmp_path}/parted"
    for arguments in ((straight, "--run.num_steps=5"), (parted, "--run.num_steps=3"), (parted, "--run.num_steps=5")):
        done = train(run_file, *SELECTION, *arguments)
        assert done.returncode == 0, done.stderr
    lines = metric_lines(tmp_path / "straight")
    skipped = [line["data/prompts_skipped"] for line in lines]
    # two steps see all 16 prompts once; from then on an untrained policy has left mostly "never solved" behind
    assert skipped[:2] == [0, 0]
    assert 0 < max(skipped) <= 8 * 4
    assert metric_lines(tmp_path / "parted") == lines

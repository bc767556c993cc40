"""Every other rule of the loss at once through the real command line, straight and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.runs import metric_lines, train, write_run_file

pytestmark = pytest.mark.integration

RULES = (
    "--eval.sets={}",
    "--algo.policy_loss.kind=kl_cov",
    "--algo.policy_loss.fraction=0.05",
    "--algo.normalizer=constant",
    "--algo.advantage.kind=dr_grpo",
    "--algo.kl_coefficient=0.1",
    "--algo.correction.weight=token",
    "--algo.overlong_buffer=4",
)


def test_a_resumed_run_with_every_rule_is_the_straight_one(tmp_path: Path, warm_policy: Path) -> None:
    run_file = write_run_file(tmp_path, base=warm_policy)
    straight, parted = f"--run.output_dir={tmp_path}/straight", f"--run.output_dir={tmp_path}/parted"
    for arguments in ((straight, "--run.num_steps=4"), (parted, "--run.num_steps=2"), (parted, "--run.num_steps=4")):
        done = train(run_file, *RULES, *arguments)
        assert done.returncode == 0, done.stderr
    lines = metric_lines(tmp_path / "straight")
    assert len(lines) == 4
    for line in lines:
        assert line["loss/kl"] > 0  # after the first of the two mini-batches the policy has left its reference
        assert 0 < line["train/cov_selected"] <= 0.05
        assert 0.99 < line["train/importance_sample_size"] <= 1  # fp32: engine and trainer agree
        assert line["train/importance_cut"] == 0
        assert line["train/clip_low"] == line["train/clip_high"] == 0
        assert 0 < line["reward/overlong_penalty"] <= 1
        total = line["loss/policy"] - line["loss/entropy_bonus"] + 0.1 * line["loss/kl"]
        assert line["loss/total"] == pytest.approx(total, rel=1e-9, abs=1e-12)
    assert lines[-1]["loss/kl"] > lines[0]["loss/kl"]
    # the resumed run's reference is the initial policy again: were it the resumed one, loss/kl would start over
    assert metric_lines(tmp_path / "parted") == lines

"""A real training under the clamped entropy of examples/extend, a rule that no file of the package knows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.support.runs import metric_lines, run_command, train, write_run_file

pytestmark = pytest.mark.integration

KIND = "examples.extend.clamped_entropy:ClampedEntropy"
# a band that no policy of a small vocabulary reaches: alpha rises from the first step
BAND = tuple(f"--algo.entropy.{text}" for text in ("low=20", "high=21", "gain=0.001", "alpha_max=0.03"))


def test_a_rule_of_ones_own_trains_resumes_and_is_replayed(tmp_path: Path, warm_policy: Path) -> None:
    run_file = write_run_file(tmp_path, base=warm_policy)
    arguments = (f"--algo.entropy.kind={KIND}", *BAND, "--eval.sets={}")
    done = train(run_file, *arguments, "--run.num_steps=2")
    assert done.returncode == 0, done.stderr
    # the options of the file's own rule are left out, and this is said once
    said = [line for line in done.stderr.splitlines() if line.startswith("left out of ")]
    assert len(said) == 1 and "algo.entropy.tau, algo.entropy.normalize" in said[0]
    done = train(run_file, *arguments, "--run.num_steps=3")
    assert done.returncode == 0, done.stderr

    lines = metric_lines(tmp_path / "out")
    assert [line["step"] for line in lines] == [0, 1, 2]
    alpha = 0.0
    for line in lines:
        alpha = min(alpha + 0.001 * (20 - line["entropy/token_mean"]), 0.03)
        assert line["aer/alpha"] == line["aer/coefficient"] == pytest.approx(alpha, rel=1e-12)
        assert line["entropy/target"] == 20
        assert line["user/inside_band"] == 0
        assert line["loss/entropy_bonus"] != 0
    assert lines[-1]["aer/reason"].endswith("; at the upper bound 0.03")
    config = json.loads((tmp_path / "out" / "run.json").read_text())["config"]
    assert config["algo"]["entropy"]["kind"] == KIND

    command = [sys.executable, "-m", "aer_megatron.cli", "replay", str(tmp_path / "out")]
    refused = run_command(command)  # a record is not the user's word
    assert refused.returncode == 2 and "--trust-code" in refused.stderr.splitlines()[-1], refused.stderr
    command.append("--trust-code")
    replayed = run_command(command)
    assert replayed.returncode == 0 and "alpha reproduced exactly" in replayed.stdout, replayed.stderr
    other = run_command([*command, "--algo.entropy.kind=aer", "--algo.entropy.tau=2"])
    assert other.returncode == 0 and "they differ most" in other.stdout, other.stderr

"""The parity report through its command line, on a model of seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from aer_megatron.fp8_parity.command import main
from tests.support.runs import ROOT, environment, write_run_file

STEPS = 4


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory, warm_policy: Path) -> Path:
    return write_run_file(tmp_path_factory.mktemp("parity"), base=warm_policy)


def parity(run_file: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "aer_megatron.cli", "fp8-parity", str(run_file), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment(), cwd=ROOT, check=False
    )


def test_report_holds_every_recipe_and_the_exact_run(run_file: Path) -> None:
    folder = run_file.parent / "report"
    result = parity(run_file, f"--steps={STEPS}", "--recipes=delayed,blockwise", f"--output={folder}")
    assert result.returncode == 0, result.stderr
    assert "FP8 emulated on CPU: recipe delayed" in result.stderr
    assert (folder / "fp8_parity.png").stat().st_size > 10_000
    assert (folder / "fp8_parity.md").read_text(encoding="utf-8") == result.stdout
    exact, delayed, blockwise, weights = json.loads((folder / "fp8_parity.json").read_text(encoding="utf-8"))
    assert [row["precision"] for row in (exact, delayed, blockwise, weights)] == [
        "fp32",
        "delayed",
        "blockwise",
        "rollout weights",
    ]
    assert exact["logprob_shift_max_abs"] == 0.0 and exact["layer_output_error"] == [0.0, 0.0]
    for row in (delayed, blockwise):
        assert 0 < row["logprob_shift_mean_abs"] < 0.5
        assert 0.5 < row["grad_norm"] / exact["grad_norm"] < 2
        first, second = row["layer_output_error"]
        assert 0.001 < first < 0.2 and 0.001 < second < 0.2
        # H_0, and with it H*, is what this recipe's own forward pass measures
        assert row["token_entropy_trace"][0] == pytest.approx(row["token_entropy"])
        assert row["target"] == pytest.approx(1.1 * row["token_entropy"])
        assert row["target"] != exact["target"]
        assert len(row["alpha_trace"]) == STEPS and max(row["alpha_trace"]) > 0
    assert weights["logprob_shift_mean_abs"] > 0 and "alpha_trace" not in weights
    assert exact["rollout_mismatch_kl"] < 1e-9 < 1e-6 < weights["rollout_mismatch_kl"]


def test_the_row_of_rollout_weights_is_what_an_fp8_engine_holds(run_file: Path) -> None:
    """With the option the first batch is sampled by the rounded policy: only that row then has no mismatch."""
    folder = run_file.parent / "rounded"
    result = parity(run_file, "--steps=1", "--recipes=", f"--output={folder}", "--rollout.quantization=fp8")
    assert result.returncode == 0, result.stderr
    exact, weights = json.loads((folder / "fp8_parity.json").read_text(encoding="utf-8"))
    assert weights["rollout_mismatch_kl"] < 1e-9 < 1e-6 < exact["rollout_mismatch_kl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--recipes=tensorwide", "tensorwide"),
        ("--steps=0", "--steps=0"),
        ("--parallel.pp=2", "--parallel.pp=1"),
    ],
)
def test_wrong_options_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    assert main([str(write_run_file(tmp_path)), arguments]) == 2
    assert message in capsys.readouterr().err

"""The doctor's command line on the quick start's own run file, and its exit codes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from aer_megatron.doctor import command as doctor
from tests.support.runs import run_command

RUN = "examples/quickstart/countdown.toml"


def examine(folder: Path, *arguments: str, ranks: int) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "aer_megatron.cli", "launch", "--nproc", str(ranks), "doctor"]
    return run_command([*launcher, RUN, f"--run.output_dir={folder}/out", *arguments])


@pytest.mark.integration
def test_the_quick_start_is_fit_on_two_ranks(tmp_path: Path) -> None:
    # no warm start has run: the examination takes random weights for sft.init
    finished = examine(tmp_path, f"--model.path={tmp_path}/base", ranks=2)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    seconds = re.search(r"skipped in (\d+) s$", finished.stdout, re.MULTILINE)
    assert seconds is not None and int(seconds[1]) < 120
    assert "doctor: 2 ranks, fp32, random weights for examples/quickstart/model" in finished.stdout
    assert "doctor: fit;" in finished.stdout
    for layout in ("dp 2", "tp 2", "tp 2 sp", "pp 2", "cp 2", "packed", "packed cp 2", "other head", "recompute full"):
        assert f"layouts: loss                        {layout} " in finished.stdout, layout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["doctor"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([RUN, "--reference=sometimes"], "--reference=sometimes is not known; use auto or never or always"),
        ([RUN, RUN], "the run file is already"),
        (["--reference=never"], "the run file is missing"),
        ([RUN, "--parallel.tq=2"], "unknown option parallel.tq"),
    ],
)
def test_a_wrong_command_line_is_one_message(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_help_costs_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--help"]) == 0
    assert "--reference MODE" in capsys.readouterr().out

"""``aer verify-resume``: a run that loses nothing, and a resume that loses the optimizer's state."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from aer_megatron.verify_resume import command as verify_resume
from tests.support.runs import ROOT, run_command, write_run_file

FORGETFUL = ROOT / "tests" / "support" / "forgetful_train.py"


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory, random_policy: Path) -> Path:
    return write_run_file(tmp_path_factory.mktemp("verify"), base=random_policy)


def test_nothing_is_lost_under_the_own_layout_and_another(run_file: Path, tmp_path: Path) -> None:
    done = run_command(
        [sys.executable, "-m", "aer_megatron.cli", "verify-resume", str(run_file), "--parallel.tp=2", "--to",
         "tp=1,pp=2", "--work", str(tmp_path), "--steps=1"]
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.endswith(("OK", "FAILED"))]
    assert len(rows) == 8
    assert all(line.endswith("OK") for line in rows)
    assert "no gradient" not in done.stdout
    assert "checkpoint of step 1 through pp 2 and back" in done.stdout
    assert list(tmp_path.iterdir()) == []  # the runs are removed
    assert not (run_file.parent / "out").exists()  # run.output_dir is not touched


def test_a_resume_that_loses_the_optimizers_state_fails(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = verify_resume.launch_command

    def forgetful(num_ranks: int, *program: str) -> list[str]:
        return launch(num_ranks, *program) if program[0] == "-m" else [sys.executable, str(FORGETFUL), *program]

    monkeypatch.setattr(verify_resume, "launch_command", forgetful)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert verify_resume.main([str(run_file), "--nproc=1", "--steps=1", f"--work={tmp_path}"]) == 1
    printed = capsys.readouterr().out
    failed = [line for line in printed.splitlines() if line.endswith("FAILED")]
    assert any("weights, optimizer, ledger after step 1" in line for line in failed), printed
    assert "kept in" in printed
    assert len(list(tmp_path.iterdir())) == 1  # the evidence stays

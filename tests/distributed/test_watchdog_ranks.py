"""A run whose rank 1 sleeps in front of a collective is ended within its timeout, and both ranks say where they are."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.support.runs import ROOT, environment

TIMEOUT_S = 3.0


def launch(kind: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "aer_megatron.cli", "launch", "--nproc", "2"]
    return subprocess.run(
        [*command, "-m", "tests.support.hanging_ranks", str(TIMEOUT_S), kind],
        capture_output=True, text=True, timeout=120, env=environment(), cwd=ROOT, check=False,
    )  # fmt: skip


def report(done: subprocess.CompletedProcess[str], rank: int) -> str:
    lines = [line for line in done.stderr.splitlines() if line.startswith(f"[rank {rank}] ")]
    assert lines, done.stderr
    return "\n".join(lines)


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["sleep", "late"])
def test_a_rank_that_sleeps_in_front_of_a_collective_ends_the_run(kind: str) -> None:
    done = launch(kind)
    assert done.returncode == 124, done.stderr
    assert re.search(r"rank [01] was ended by its hang watchdog", done.stderr.splitlines()[-1]), done.stderr
    waiting, sleeping = report(done, 0), report(done, 1)
    for text in (waiting, sleeping):
        assert "phase score of step 9" in text
        assert "the newest checkpoint is step_00000004" in text
    assert re.search(r"waits in all_gather", waiting)
    assert "in all_gather_ragged" in waiting
    assert "sleep_in_front_of_the_collective" in sleeping
    assert "is in no collective" in sleeping
    seconds = float(re.search(r"for ([0-9.]+) s \(longer than run.hang_timeout_s=3\)", waiting + sleeping)[1])  # type: ignore[index]
    assert TIMEOUT_S <= seconds < 2 * TIMEOUT_S
    if kind == "late":  # its own time is not up: the other rank's alarm made it speak
        assert "(another rank hangs)" in sleeping


@pytest.mark.integration
def test_a_run_that_moves_on_is_left_alone() -> None:
    done = launch("none")
    assert done.returncode == 0, done.stderr
    assert "hang watchdog" not in done.stderr
    assert done.stdout.count("is done") == 2

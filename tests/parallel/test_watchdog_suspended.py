"""A process that is suspended for longer than the limit goes on when it is woken; a hang after that is still found."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from aer_megatron.parallel.second_line import count
from tests.support.runs import ROOT, environment

TIMEOUT_S = 2.0
PATIENCE_S = 120.0


@contextmanager
def watched(kind: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.support.suspended_process", str(TIMEOUT_S), kind]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=ROOT,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "waits\n"
            yield process
        finally:
            process.kill()


def suspend(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGSTOP)
    time.sleep(2.5 * TIMEOUT_S)  # beyond the limit of the watchdog's thread, and of the second line
    process.send_signal(signal.SIGCONT)
    time.sleep(TIMEOUT_S / 4)  # the watchdog wakes up, and finds the process where it was
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


@pytest.mark.processes
def test_time_in_suspension_is_not_time_in_a_place() -> None:
    with watched("moves") as process:
        suspend(process)
        out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    assert out == "done\n"
    assert err == ""


@pytest.mark.processes
def test_a_hang_after_a_suspension_is_found() -> None:
    with watched("hangs") as process:
        suspend(process)
        _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 124, err
    assert "longer than run.hang_timeout_s=2" in err


@pytest.mark.processes
def test_a_call_that_holds_the_interpreter_is_ended_from_outside_with_its_stack() -> None:
    with watched("held") as process:
        suspend(process)
        _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == -signal.SIGUSR2, err
    assert "suspended_process.py" in err
    assert "in main" in err


def test_a_late_wake_up_counts_as_one_period() -> None:
    assert count(0.4, 0.3) == 0.4
    assert count(1.5, 0.3) == 1.5
    assert count(3600.0, 0.3) == 0.3

"""The lock of a run folder: who is refused, and that nothing but a living run holds it."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from aer_megatron.files.run_lock import RunLock
from tests.support.runs import ROOT

OPTION = "run.output_dir='runs/a'"
HOLDER = """
import os, subprocess, sys, time
from pathlib import Path
from aer_megatron.files.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]), option="x", job="SLURM_JOB_ID 4711")
started = subprocess.Popen(["sleep", "60"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, close_fds=False)
ready, begun = os.pipe()
forked = os.fork()
if not forked:
    os.write(begun, b"x")
    time.sleep(60)
    os._exit(0)
os.read(ready, 1)
print(started.pid, forked, flush=True)
sys.stdin.read()
"""


@pytest.mark.processes
def test_a_second_process_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    """Neither a program that the holder started nor a child that it forked keeps the lock after its SIGKILL."""
    path = tmp_path / "new" / "run.lock"
    children: list[int] = []
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as holder:
        try:
            assert holder.stdout is not None
            children = [int(word) for word in holder.stdout.readline().split()]
            before = path.read_bytes()
            with pytest.raises(ValueError, match="is in use by another run") as refusal:
                RunLock(path, option=OPTION, job=None)
            host = f"host {os.uname().nodename}"
            for word in (OPTION, f"pid {holder.pid}", "job SLURM_JOB_ID 4711", host, "since 2"):
                assert word in str(refusal.value)
            assert path.read_bytes() == before
            holder.kill()
            holder.wait()
            with RunLock(path, option=OPTION, job=None):  # what it left behind blocks nobody
                assert f'"pid": {os.getpid()}' in path.read_text()
        finally:
            for pid in children:
                os.kill(pid, signal.SIGKILL)


def test_a_released_lock_is_free(tmp_path: Path) -> None:
    for _ in range(2):
        with RunLock(tmp_path / "run.lock", option=OPTION, job=None), pytest.raises(ValueError, match="in use"):
            RunLock(tmp_path / "run.lock", option=OPTION, job=None)


@pytest.mark.parametrize("content", [b"", b"\xff{", b"[" * 100_000, b'["x"]', b'{"pid": {"a": 1}}'])
def test_whatever_the_file_holds_the_refusal_is_a_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.lock"
    with RunLock(path, option=OPTION, job=None):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"in use by another run \(.{2,200}\)"):
            RunLock(path, option=OPTION, job=None)


def test_a_file_system_without_locks_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="no locks"), RunLock(tmp_path / "run.lock", option=OPTION, job=None):
        pass


def test_a_link_in_the_place_of_the_lock_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("text")
    (tmp_path / "run.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError):
        RunLock(tmp_path / "run.lock", option=OPTION, job=None)
    assert (tmp_path / "precious").read_text() == "text"

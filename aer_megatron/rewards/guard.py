"""The small process between the trainer and a verifier process: when one of them ends, all below it ends.

    trainer --pipe--> guard --fork--> worker --> whatever a verifier starts, by double fork or in a session of its own

The guard is the subreaper of all below it: the kernel hands it every orphan, so nothing leaves its reach while it
lives, and the kernel kills the worker with the guard. What verifiers print is read here and, but for its end, dropped.

This file does NOT import anything that takes time or memory: one such process stands beside every worker.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PARENT_POLL_MS = 1000  # a process that the trainer forked may hold the pipe open
_END_LIMIT_S = 10.0
_LAST_WORDS = 2000  # bytes
_OOM_SCORE = "500"  # where memory ends, the kernel takes verifiers before trainers
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main(arguments: list[str]) -> None:
    """Runs one verifier process: socket's descriptor, trainer's pid, seconds per answer, MiB of memory."""
    descriptor, parent, timeout_s, memory_mb = json.loads(arguments[0])

    def serve() -> None:
        from aer_megatron.rewards.worker import run_worker

        run_worker(descriptor, timeout_s, memory_mb)

    run_guarded(parent, serve, descriptor)


def run_guarded(parent: int, serve: Callable[[], None], descriptor: int) -> None:
    """Runs ``serve`` in a child process and returns there when it is done; the guard itself never returns.

    The guard ends with all below it when the child ends, its standard input speaks or closes, or process ``parent`` is
    gone. It writes the end of what they printed to its standard output; its exit code is the child's, 128 + n for a
    signal n, 0 where the child still ran. ``descriptor`` is the child's alone.
    """
    os.set_inheritable(descriptor, False)
    # the guard hears of every descendant's end, and of signals through a pipe
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for number in _FORWARDED:
        signal.signal(number, signal.SIG_IGN)
    wake_in, wake_out = os.pipe()
    os.set_blocking(wake_in, False)
    os.set_blocking(wake_out, False)
    signal.set_wakeup_fd(wake_out)
    signal.signal(signal.SIGCHLD, lambda number, where: None)
    output_in, output_out = os.pipe()
    guard = os.getpid()
    # the child has none of the guard's signals, pipes or group
    worker = os.fork()
    if worker == 0:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        signal.set_wakeup_fd(-1)
        for number in (*_FORWARDED, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        os.setsid()  # a verifier that signals its own group does not reach the guard
        _redirect(output_out)
        for unused in (wake_in, wake_out, output_in, output_out):
            os.close(unused)
        with contextlib.suppress(OSError):
            _write_oom_score()
        if os.getppid() == guard:
            serve()
        return
    # the guard watches, ends what is left, and hands on the last words
    os.close(descriptor)
    os.close(output_out)
    status, words = _watch(worker, parent, wake_in, output_in)
    ended = _end_descendants(worker)
    os.set_blocking(output_in, False)
    with contextlib.suppress(BlockingIOError):
        while data := os.read(output_in, 1 << 16):
            words = (words + data)[-_LAST_WORDS:]
    with contextlib.suppress(OSError):
        os.write(1, words)
    status = ended if status is None else status
    os._exit(0 if status is None else status if status >= 0 else 128 - status)


def _watch(worker: int, parent: int, wake_in: int, output_in: int) -> tuple[int | None, bytes]:
    """Waits until it is time to end; returns the worker's exit code (None: it runs) and the end of its output."""
    poller = select.poll()
    for descriptor in (0, wake_in, output_in):
        poller.register(descriptor, select.POLLIN)
    words = b""
    while True:
        for descriptor, _ in poller.poll(_PARENT_POLL_MS):
            if descriptor == 0:
                return None, words
            data = os.read(descriptor, 1 << 16)
            if descriptor == output_in:
                words = (words + data)[-_LAST_WORDS:]
                if not data:
                    poller.unregister(output_in)
        status = _reap(worker)[1]
        if status is not None or os.getppid() != parent:
            return status, words


def _reap(worker: int) -> tuple[bool, int | None]:
    """Returns (whether children are left, the worker's exit code if it was among those that had ended)."""
    found = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return False, found
        if pid == 0:
            return True, found
        if pid == worker:
            found = os.waitstatus_to_exitcode(status)


def _end_descendants(worker: int) -> int | None:
    """Kills until nothing is left below this process; returns the worker's exit code if it ended here."""
    status: int | None = None
    deadline = time.monotonic() + _END_LIMIT_S  # a process in an uninterruptible call of the kernel stays
    while time.monotonic() < deadline:
        for pid in _descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        left, found = _reap(worker)
        status = found if found is not None else status
        if not left:
            break
        time.sleep(0.001)
    return status


def _descendants(root: int) -> list[int]:
    parents: dict[int, int] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                parents[int(name)] = int(file.read().rsplit(b")", 1)[1].split()[1])
    found, new = set[int](), {root}
    while new:
        new = {pid for pid, parent in parents.items() if parent in new} - found
        found |= new
    return sorted(found)


def _redirect(output: int) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(null)


def _write_oom_score() -> None:
    with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write(_OOM_SCORE)


if __name__ == "__main__":
    main(sys.argv[1:])

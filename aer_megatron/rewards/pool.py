"""Verifier processes with a hard time limit: every answer gets a verdict, whatever its verifier does.

A worker is a fresh interpreter, neither forked (torch and gloo have threads) nor spawned by multiprocessing
(that would import the trainer's main module, torch included, into every worker). One answer at a time goes to
a worker, so that a kill costs one answer. Workers start on first use.

    verdict reason            the verifier
    timeout                   ran past timeout_s and was killed (or math-verify's own alarm ended it)
    crashed                   ended its process
    verifier_error:NAME       raised NAME, or returned no verdict

This file does NOT know what any verifier does.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import NamedTuple, Self

from aer_megatron.types import Prompt, Verdict

_START_LIMIT_S = 120.0
_MAX_FAILED_STARTS = 3
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[4]); "
    "from aer_megatron.rewards.worker import run_worker; "
    "run_worker(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))"
)


class Job(NamedTuple):
    verifier: str
    text: str
    prompt: Prompt


class _Worker:
    """One process, the connection to it, and what it is doing."""

    def __init__(self, timeout_s: float) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            arguments = [str(theirs.fileno()), str(os.getpid()), str(timeout_s), json.dumps(sys.path)]
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, *arguments],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # a group of its own: what a verifier starts ends with it
            )
        self.connection = Connection(ours.detach())
        self.loaded: set[str] = set()
        self.loading: list[str] = []
        self.job: int | None = None
        self.deadline = 0.0

    @property
    def is_idle(self) -> bool:
        return self.job is None and not self.loading

    def load(self, names: Iterable[str]) -> None:
        self.loading.extend(names)
        self.deadline = time.monotonic() + _START_LIMIT_S
        for name in self.loading:
            self.connection.send(("load", name))

    def kill(self) -> None:
        self.connection.close()
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class VerifierPool:
    """Up to ``num_workers`` verifier processes; ``timeout_s`` limits one answer. For use from one thread."""

    def __init__(self, num_workers: int, timeout_s: float) -> None:
        self._num_workers = num_workers
        self._timeout_s = timeout_s
        self._workers: list[_Worker] = []
        self._num_failed_starts = 0
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def warm(self, verifiers: Iterable[str]) -> None:
        """Starts all workers and lets them load ``verifiers`` (imports take seconds); does not wait."""
        names = sorted(set(verifiers))
        if names and not self._closed and not self._workers:
            self._workers = [_Worker(self._timeout_s) for _ in range(self._num_workers)]
            for worker in self._workers:
                worker.load(names)

    def verify(self, jobs: Sequence[Job]) -> list[Verdict]:
        """Returns one verdict per job, in the order of ``jobs``.

        Raises:
            RuntimeError: the pool is closed, a verifier cannot be loaded, or workers end again and again
                while they start.
        """
        if self._closed:
            raise RuntimeError("the verifier pool is closed; make a new one")
        verdicts: dict[int, Verdict] = {}
        waiting = deque(range(len(jobs)))
        while len(verdicts) < len(jobs):
            self._start_workers(len(waiting))
            for worker in [w for w in self._workers if w.is_idle]:
                if waiting:
                    self._assign(worker, jobs, waiting)
            self._receive(verdicts)
            self._kill_overdue(verdicts)
        return [verdicts[index] for index in range(len(jobs))]

    def close(self) -> None:
        """Ends every worker and waits for its end; the pool cannot be used afterwards."""
        self._closed = True
        for worker in self._workers:
            worker.kill()
        self._workers.clear()

    def _start_workers(self, num_waiting: int) -> None:
        num_idle = sum(worker.job is None for worker in self._workers)
        num_new = min(self._num_workers - len(self._workers), num_waiting - num_idle)
        self._workers.extend(_Worker(self._timeout_s) for _ in range(num_new))

    def _assign(self, worker: _Worker, jobs: Sequence[Job], waiting: deque[int]) -> None:
        job = jobs[waiting[0]]
        try:
            if job.verifier not in worker.loaded:
                worker.load([job.verifier])
                return
            worker.deadline = time.monotonic() + self._timeout_s
            worker.connection.send(("judge", *job))
            worker.job = waiting.popleft()
        except OSError:  # it ended while idle or starting: not this answer's fault, which stays in the queue
            self._discard(worker)

    def _receive(self, verdicts: dict[int, Verdict]) -> None:
        busy = {worker.connection: worker for worker in self._workers if not worker.is_idle}
        if not busy:
            return
        limit = min(worker.deadline for worker in busy.values()) - time.monotonic()
        for connection in wait(list(busy), timeout=max(0.0, limit)):
            worker = busy[connection]  # type: ignore[index]
            try:
                message = worker.connection.recv()
            except (EOFError, OSError):
                if worker.job is not None:
                    verdicts[worker.job] = Verdict(0.0, "crashed")
                self._discard(worker)
                continue
            if message[0] == "failed":
                raise RuntimeError(
                    f"verifier {message[1]!r} cannot be loaded in a worker process: {message[2]}"
                )
            if message[0] == "loaded":
                worker.loading.remove(message[1])
                worker.loaded.add(message[1])
                self._num_failed_starts = 0
            elif worker.job is not None:
                verdicts[worker.job] = message[1]
                worker.job = None

    def _kill_overdue(self, verdicts: dict[int, Verdict]) -> None:
        now = time.monotonic()
        for worker in [w for w in self._workers if not w.is_idle and w.deadline <= now]:
            if worker.connection.poll():  # its word arrived between the wait and here
                continue
            if worker.job is not None:
                verdicts[worker.job] = Verdict(0.0, "timeout")
            self._discard(worker)

    def _discard(self, worker: _Worker) -> None:
        worker.kill()
        self._workers.remove(worker)
        if worker.job is not None or worker.is_idle:
            return
        self._num_failed_starts += 1
        if self._num_failed_starts >= _MAX_FAILED_STARTS:
            raise RuntimeError(
                f"verifier processes ended {self._num_failed_starts} times while they loaded "
                f"{worker.loading}; "
                f"see their messages on stderr (out of memory, a broken package?)"
            )

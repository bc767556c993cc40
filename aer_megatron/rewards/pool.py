"""Verifier processes with a hard time limit: every answer gets a verdict, whatever its verifier does.

A worker is a fresh interpreter, neither forked (torch and gloo have threads) nor spawned by multiprocessing
(that would import the trainer's main module, torch included, into every worker). One answer at a time goes to
a worker, so that a kill costs one answer. Workers start on first use, each below a guard (rewards/guard.py).

    verdict reason            the verifier
    timeout                   ran past timeout_s and was killed (or the alarm of math_verify ended it)
    crashed                   ended its process, or sent what is no verdict, for this answer twice
    verifier_error_NAME       raised NAME, or returned no verdict

This file does NOT know what any verifier does.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, NamedTuple, Self

from aer_megatron.options.data import RewardSection
from aer_megatron.rewards.messages import Channel, Garbage, encode_prompt, frame, frame_job, read_verdict
from aer_megatron.rewards.registry import find_verifier
from aer_megatron.types import Prompt, Verdict

_LOG = logging.getLogger(__name__)
_MEMORY_MB: int = RewardSection.model_fields["memory_mb"].default
_START_LIMIT_S = 120.0
_END_LIMIT_S = 15.0
_MAX_FAILED_STARTS = 3
_MAX_TOLD = 8
_POLL_S = 1.0  # a process may end while others hold its socket open
_WORDS_LENGTH = 600
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from aer_megatron.rewards.guard import main; main(sys.argv[1:])"
)


class UnusableVerifier(RuntimeError):
    """A worker process could not load a verifier."""

    def __init__(self, name: str, cause: str) -> None:
        super().__init__(f"verifier {name!r} cannot be loaded in a worker process: {cause}")
        self.cause = cause


def check_verifiers(names: Iterable[str]) -> None:
    """Raises where a verifier of ``names`` cannot be used: a typing error stops a run before its first step.

    Functions are loaded in a process of their own, as they will be: importing user code has effects.

    Raises:
        ValueError: a name is unknown, refused as a reward, cannot be imported or is no function of (text, prompt).
        RuntimeError: the process ends or hangs while it loads one.
    """
    open_names = sorted(name for name in set(names) if find_verifier(name).is_checked_in_worker)
    if not open_names:
        return
    with VerifierPool(1, _START_LIMIT_S) as pool:
        try:
            pool.load(open_names)
        except UnusableVerifier as error:
            raise ValueError(error.cause) from None


class Job(NamedTuple):
    verifier: str
    text: str
    prompt: Prompt


class _Worker:
    """One process below its guard, the channel to it, and what it is doing."""

    def __init__(self, timeout_s: float, memory_mb: int) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            options = json.dumps([theirs.fileno(), os.getpid(), timeout_s, memory_mb])
            self._guard = subprocess.Popen(
                [sys.executable, "-c", _BOOT, options, json.dumps(sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        self.channel = Channel(ours)
        self.loaded: set[str] = set()
        self.loading: list[str] = []
        self.job: int | None = None
        self.number = 0
        self.is_fresh = True
        self.deadline = 0.0

    @property
    def is_idle(self) -> bool:
        return self.job is None and not self.loading

    @property
    def has_ended(self) -> bool:
        return self._guard.poll() is not None

    def load(self, names: Iterable[str]) -> None:
        self.loading.extend(names)
        self.deadline = time.monotonic() + _START_LIMIT_S
        for name in self.loading:
            self.channel.send(frame({"load": name}))

    def begin(self, index: int, job: Job, prompt: str, timeout_s: float) -> None:
        """Sends a job under a number that nothing but its message tells."""
        if self.channel.has_stray_bytes():
            raise Garbage("it spoke without being asked")
        self.number = secrets.randbits(63)
        self.deadline = time.monotonic() + timeout_s
        self.channel.send(frame_job(job.verifier, self.number, job.text, prompt))
        self.job = index
        self.is_fresh = False

    def take_load(self, message: Mapping[str, Any]) -> None:
        """Takes the worker's word on a verifier that it was to load.

        Raises:
            UnusableVerifier: it could not.
            Garbage: it says something else.
        """
        name = message.get("loaded", message.get("failed"))
        if name not in self.loading:
            raise Garbage("no word on what it loads")
        self.loading.remove(name)
        if "failed" in message:
            raise UnusableVerifier(str(name), str(message.get("cause"))[:_WORDS_LENGTH])
        self.loaded.add(name)

    def end(self) -> str:
        """Returns how the process ended and its last words, when nothing that it started is left."""
        self.channel.close()
        words = b""
        try:
            # a word, because a process that the trainer forked may hold the pipe open
            words, _ = self._guard.communicate(b"end", timeout=_END_LIMIT_S)
        except subprocess.TimeoutExpired:  # stopped, or below it a process that the kernel cannot end
            with suppress(ProcessLookupError):
                os.killpg(self._guard.pid, signal.SIGKILL)
            self._guard.wait()
        text = " ".join(words.decode(errors="replace").split())[-_WORDS_LENGTH:]
        return f"exit code {self._guard.returncode}" + (f", its last words: {text!r}" if text else "")


class VerifierPool:
    """Up to ``num_workers`` verifier processes; ``timeout_s`` limits one answer. For use from one thread.

    ``memory_mb`` bounds the address space of a process beyond that of its loaded verifiers, in MiB; 0: no bound.
    """

    def __init__(self, num_workers: int, timeout_s: float, memory_mb: int = _MEMORY_MB) -> None:
        self._num_workers = num_workers
        self._timeout_s = timeout_s
        self._memory_mb = memory_mb
        self._told: set[tuple[str, str]] = set()
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
            self._workers = [self._new_worker() for _ in range(self._num_workers)]
            for worker in self._workers:
                worker.load(names)

    def load(self, verifiers: Sequence[str]) -> None:
        """Loads ``verifiers`` in one process.

        Raises:
            UnusableVerifier: one of them cannot be used.
            RuntimeError: the process ends or hangs, again and again, while it loads them.
        """
        batch = _Batch(())
        while True:
            if not self._workers:
                self._workers.append(self._new_worker())
            worker = self._workers[0]
            if worker.is_idle and worker.loaded.issuperset(verifiers):
                return
            if worker.is_idle:
                worker.load(name for name in verifiers if name not in worker.loaded)
            self._serve(batch)

    def verify(self, jobs: Sequence[Job]) -> list[Verdict]:
        """Returns one verdict per job, in the order of ``jobs``.

        Raises:
            ValueError: a prompt's metadata cannot be sent to a process.
            RuntimeError: the pool is closed, a verifier cannot be loaded, or workers end again and again
                while they start.
        """
        if self._closed:
            raise RuntimeError("the verifier pool is closed; make a new one")
        batch = _Batch(jobs)
        try:
            while len(batch.verdicts) < len(jobs):
                self._start_workers(batch)
                for worker in [w for w in self._workers if w.is_idle]:
                    self._assign(worker, batch)
                self._serve(batch)
        finally:
            for worker in [w for w in self._workers if w.job is not None]:  # after an error: no job outlives its call
                self._remove(worker)
        return [batch.verdicts[index] for index in range(len(jobs))]

    def close(self) -> None:
        """Ends every worker and waits for its end; the pool cannot be used afterwards."""
        self._closed = True
        for worker in list(self._workers):
            self._remove(worker)

    def _start_workers(self, batch: _Batch) -> None:
        free = [worker for worker in self._workers if worker.job is None]
        num_missing = len(batch.waiting) + len(batch.again) - len(free)
        num_fresh_missing = len(batch.again) - sum(worker.is_fresh for worker in free)
        num_new = min(self._num_workers - len(self._workers), max(num_missing, num_fresh_missing))
        self._workers.extend(self._new_worker() for _ in range(num_new))

    def _assign(self, worker: _Worker, batch: _Batch) -> None:
        # what ended a worker is tried again in a fresh one, as long as there can be one
        fresh = worker.is_fresh or not any(other.is_fresh for other in self._workers)
        queue = batch.again if batch.again and fresh else batch.waiting
        if not queue:
            return
        job = batch.jobs[queue[0]]
        try:
            if job.verifier not in worker.loaded:
                worker.load([job.verifier])
                return
            worker.begin(queue[0], job, batch.prompt_text(queue[0]), self._timeout_s)
            queue.popleft()
        except (EOFError, OSError, Garbage) as error:  # while idle: not this answer's fault, which stays in the queue
            self._lose(worker, batch, error)

    def _serve(self, batch: _Batch) -> None:
        """Waits until a worker says something, ends or runs out of time, and acts on it."""
        busy = [worker for worker in self._workers if not worker.is_idle]
        poller = select.poll()
        for worker in busy:
            poller.register(worker.channel, select.POLLIN | (select.POLLOUT if worker.channel.has_outgoing else 0))
        limit_s = min((worker.deadline for worker in busy), default=0.0) - time.monotonic()
        ready = {descriptor for descriptor, _ in poller.poll(1000.0 * min(max(limit_s, 0.0), _POLL_S))}
        now = time.monotonic()
        for worker in busy:
            overdue = worker.deadline <= now
            try:
                if overdue or worker.channel.fileno() in ready:
                    self._listen(worker, batch)
                elif not ready and worker.has_ended:
                    raise EOFError
            except (EOFError, OSError, Garbage) as error:
                self._lose(worker, batch, error)
                continue
            if overdue and not worker.is_idle:
                if worker.job is not None and not worker.has_ended:
                    batch.verdicts[worker.job] = Verdict(0.0, "timeout")
                    worker.job = None
                    self._remove(worker)
                else:
                    self._lose(worker, batch, EOFError())

    def _listen(self, worker: _Worker, batch: _Batch) -> None:
        worker.channel.flush()
        while not worker.is_idle:
            message = worker.channel.receive()
            if message is None:
                return
            if worker.job is None:
                worker.take_load(message)
                continue
            verdict = read_verdict(message, worker.number)
            batch.verdicts[worker.job] = verdict
            if "cause" in message:
                self._tell(batch.jobs[worker.job].verifier, verdict.reason, str(message["cause"]))
            worker.job = None
            self._num_failed_starts = 0

    def _lose(self, worker: _Worker, batch: _Batch, error: Exception) -> None:
        """Acts on a worker that ended by itself or said what is no message."""
        how = self._remove(worker)
        if isinstance(error, Garbage):
            how = f"a message that is none: {error}"
        if worker.job is not None:
            if batch.give_up(worker.job):
                self._tell(batch.jobs[worker.job].verifier, "crashed", f"two processes ended, the last with {how}")
            return
        if not worker.is_fresh:
            return
        self._num_failed_starts += 1
        if self._num_failed_starts >= _MAX_FAILED_STARTS:
            names = sorted({*worker.loading, *worker.loaded})
            raise RuntimeError(
                f"verifier processes ended {self._num_failed_starts} times while they loaded {names}, the last one "
                f"with {how} (out of memory, a broken package?)"
            )

    def _remove(self, worker: _Worker) -> str:
        self._workers.remove(worker)
        return worker.end()

    def _new_worker(self) -> _Worker:
        return _Worker(self._timeout_s, self._memory_mb)

    def _tell(self, verifier: str, reason: str, cause: str) -> None:
        """Logs why answers have a reason, once for each kind: a user's error in a verifier wants to be found."""
        if (verifier, reason) in self._told or len(self._told) >= _MAX_TOLD:
            return
        self._told.add((verifier, reason))
        cause = ascii(cause)[:_WORDS_LENGTH]
        _LOG.warning("verifier %s: %s; such answers are counted as %s with reward 0", verifier, cause, reason)


class _Batch:
    """The jobs of one call: which wait, which are tried again, and the verdicts so far."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = jobs
        self.waiting = deque(range(len(jobs)))
        self.again: deque[int] = deque()
        self.verdicts: dict[int, Verdict] = {}
        self._lost: set[int] = set()
        self._prompt: tuple[Prompt | None, str] = (None, "")

    def prompt_text(self, index: int) -> str:
        prompt = self.jobs[index].prompt
        if self._prompt[0] is not prompt:  # the G rollouts of a prompt follow one another
            self._prompt = (prompt, encode_prompt(prompt))
        return self._prompt[1]

    def give_up(self, index: int) -> bool:
        """Returns whether a job has ``crashed``: with the second process that it lost; it is tried again before."""
        if index in self._lost:
            self.verdicts[index] = Verdict(0.0, "crashed")
            return True
        self._lost.add(index)
        self.again.append(index)
        return False

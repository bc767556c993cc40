"""The processes of a launcher's ranks: started in sessions of their own, told of signals, waited for, ended.

A session of its own keeps a terminal's Ctrl-C from a rank: it reaches the launcher, which hands each signal on once,
and waits as long as the ranks take to save. SIGKILL of the launcher ends them, too (rank_main.py).

This file does NOT know torch: the agent (agent.py) gives it the ranks' environments.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from aer_megatron.console.failures import Failure, read_failure
from aer_megatron.launch.rank_main import FORWARDED
from aer_megatron.parallel.watchdog import HANG_EXIT_CODE

# what a launch exits with whose ranks stopped as they were told to
STOP_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 0}

_REPEATED = (signal.SIGTERM, signal.SIGINT)  # the second one ends a rank at once, the third one kills
_KILLING_COUNT = 3
_KILL_TIMEOUT_S = 30.0  # a process that waits for a device or a file system may not even be killed


@dataclass(slots=True)
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    error_file: Path
    exit_code: int | None = None  # as Popen.returncode: negative for a signal
    handed_over: bool = False


class RankProcesses:
    """The ranks of one machine.

    Args:
        program: what each runs: ``-m MODULE ARGUMENTS`` or ``SCRIPT.py ARGUMENTS``.
        folder: private and empty; ranks hand their failures over in it.
        shutdown_timeout_s: how long ranks may go on, to end what they started, after another one failed.
    """

    def __init__(self, program: Sequence[str], folder: Path, shutdown_timeout_s: float) -> None:
        self._program = program
        self._folder = folder
        self._shutdown_timeout_s = shutdown_timeout_s
        self._ranks: list[_Rank] = []
        self._received: list[int] = []  # signals that are not handed on yet
        self._forwarded: list[signal.Signals] = []
        self._killed: set[int] = set()  # ranks that this launcher has ended
        self._failures: list[Failure] = []
        self._deadline: float | None = None  # when the ranks that are left are ended
        self._looked_ns = time.time_ns()  # an end that is noticed now may have come right after this

    @contextlib.contextmanager
    def receiving_signals(self) -> Iterator[None]:
        """Takes the signals that belong to the ranks; SIGHUP, a lost terminal, ends neither launcher nor ranks."""
        before = {number: signal.signal(number, self._receive) for number in FORWARDED}
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def start(self, environments: Mapping[int, Mapping[str, str]]) -> dict[int, int]:
        """Returns the process id of every rank; the keys are ranks of the whole run."""
        rank_main = [sys.executable, "-m", "aer_megatron.launch.rank_main", str(os.getpid())]
        for number, environment in environments.items():
            error_file = self._folder / f"rank{number}.json"
            # blocked until the rank is past its first imports, where an interrupt would print a trace of its own
            before = signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
            try:
                process = subprocess.Popen(
                    [*rank_main, *self._program],
                    env={**environment, "TORCHELASTIC_ERROR_FILE": str(error_file)},
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            self._ranks.append(_Rank(number, process, error_file))
        return {rank.number: rank.process.pid for rank in self._ranks}

    def all_ended(self) -> bool:
        """Hands signals on, notices ends, ends what outlives a failure; returns whether no rank is left."""
        while self._received:
            self._forward(signal.Signals(self._received.pop(0)))
        now = time.time_ns()
        for rank in self._running():
            self._notice(rank)
        self._looked_ns = now
        if self._deadline is not None and time.monotonic() > self._deadline:
            self.kill()
        return not self._running()

    def kill(self) -> None:
        """Ends the ranks that run, with what they started in their groups, and waits for them."""
        running = self._running()
        for rank in running:
            self._killed.add(rank.number)
            _kill_group(rank)
        for rank in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                rank.process.wait(_KILL_TIMEOUT_S)
            rank.exit_code = -signal.SIGKILL

    def failure(self) -> Failure | None:
        """Returns the first failure in time; None where every rank is done, or has stopped as it was told to."""
        return min(self._failures, key=lambda failure: failure.time_ns, default=None)

    def exit_code(self) -> int:
        """Returns the exit code of the launch: of the first failure, else of the ranks."""
        failure = self.failure()
        if failure is not None:
            return failure.exit_code
        ended = [rank.exit_code or 0 for rank in self._ranks if rank.number not in self._killed]
        if self._forwarded and (self._killed or any(code < 0 for code in ended)):  # before they could save
            return STOP_CODES[self._forwarded[0]]
        return max(ended, default=0)

    def stop_message(self) -> str | None:
        """Returns what to say of ranks that a signal ended before they could save; None where there are none."""
        if self.failure() is None and self._forwarded and any((rank.exit_code or 0) < 0 for rank in self._ranks):
            return f"ended by {self._forwarded[-1].name}; what came after the last checkpoint is lost"
        return None

    def _running(self) -> list[_Rank]:
        return [rank for rank in self._ranks if rank.exit_code is None]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._received.append(number)

    def _forward(self, number: signal.Signals) -> None:
        self._forwarded.append(number)
        if sum(one in _REPEATED for one in self._forwarded) >= _KILLING_COUNT:
            self.kill()
        for rank in self._running():
            rank.process.send_signal(number)

    def _notice(self, rank: _Rank) -> None:
        """Takes a failure that was handed over, and the end of the process, which may come later."""
        rank.exit_code = rank.process.poll()
        failure = None if rank.handed_over else read_failure(rank.error_file)
        rank.handed_over = rank.handed_over or failure is not None
        if rank.exit_code is not None and not rank.handed_over:
            failure = self._silent_failure(rank.number, rank.exit_code)
        if failure is not None:
            self._failures.append(failure)
        if (failure is not None or (rank.exit_code or 0) < 0) and self._deadline is None:
            self._deadline = time.monotonic() + self._shutdown_timeout_s
        if (rank.exit_code or 0) < 0:
            _kill_group(rank)  # what it started in its group and could not end

    def _silent_failure(self, number: int, code: int) -> Failure | None:
        """Returns the failure of a rank that ended without a message; None for an end that is no failure."""
        if code == 0 or (self._forwarded and -code in self._forwarded) or code in STOP_CODES.values():
            return None
        if code < 0:
            name = signal.Signals(-code).name
            reason = "; is the machine out of memory?" if code == -signal.SIGKILL else "; see what it printed last"
            message, code = f"rank {number} was ended by {name}{reason}", 128 - code
        elif code == HANG_EXIT_CODE:
            message = f"rank {number} was ended by its hang watchdog, which says above what the rank waited for"
        else:
            message = f"rank {number} ended with exit code {code}; see what it printed last"
        return Failure(message, code, self._looked_ns)


def _kill_group(rank: _Rank) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(rank.process.pid, signal.SIGKILL)

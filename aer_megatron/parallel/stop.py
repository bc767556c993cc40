"""Stops a run between two steps when it is asked to: SIGTERM, SIGINT, SIGUSR1, or a time limit.

    loading    a first signal ends the rank at once, and the other ranks with it: there is nothing to save
    steps      it is a request: all ranks agree on it at the end of a step, save, and end
    any time   a second SIGINT or SIGTERM ends the process where it is

Python runs a signal's handler between two bytecodes of the main thread, which a collective may hold for minutes. So
the kernel's delivery wakes a thread of its own (``signal.set_wakeup_fd``), which counts and speaks. SIGHUP, a terminal
that is gone, is no reason to end.

This file does NOT save, and imports no torch: the handlers stand before libraries are loaded.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import FrameType, TracebackType
from typing import Any, Self

from aer_megatron.parallel.watchdog import AlarmStore

_TOLD = "aer_megatron/stop"
_SAME_PRESS_S = 1.0  # torchrun's agent hands on to its ranks what the terminal has sent them already
_UNWIND_S = 20.0  # for closing what the loading phase has opened; schedulers kill after 30 s
_STUCK_S = 3.0  # for a call, such as waiting for other nodes, to come back to Python, where it can be left
_POLL_S = 0.5
_SAY_S = 1.0
_LATEST_STEPS = 10
_NOTHING = "there is nothing to save, the run ends; the same command begins again"


class Cause(IntEnum):
    """Why a run stops; of several the largest counts, on all ranks alike."""

    NONE = 0
    TIME_LIMIT = 1
    SIGUSR1 = 2
    SIGINT = 3
    SIGTERM = 4

    @property
    def exit_code(self) -> int:
        """Of a process that ends because of it: 128 + the signal's number, as shells have it; 0 for a planned end."""
        return {Cause.SIGINT: 130, Cause.SIGTERM: 143}.get(self, 0)

    @property
    def text(self) -> str:
        return "run.max_hours" if self is Cause.TIME_LIMIT else self.name


_CAUSES = {signal.SIGTERM: Cause.SIGTERM, signal.SIGINT: Cause.SIGINT, signal.SIGUSR1: Cause.SIGUSR1}
_SIGNALS = {cause: number for number, cause in _CAUSES.items()}


class StopRun(SystemExit):
    """Leaves the loading phase: an exit on purpose, which nothing on the way takes for a failure."""

    def __init__(self, cause: Cause) -> None:
        super().__init__(cause.exit_code)
        self.cause = cause


class StopRequests:
    """The signals of one rank; made and entered in the main thread.

    Args:
        say: takes one line for the user, or None on a rank that does not speak.
        max_hours: since now, after which the run is to end; 0 = no limit.
        end: ends the process at once; replaced in tests.
    """

    def __init__(
        self, say: Callable[[str], None] | None, *, max_hours: float = 0.0, end: Callable[[int], Any] = os._exit
    ) -> None:
        self._say = say
        self._end = end
        self._limit_s = 3600.0 * max_hours
        self._began = self._step_began = time.monotonic()
        self._durations_s: deque[float] = deque(maxlen=_LATEST_STEPS)
        self._cause = Cause.NONE  # this rank's own
        self._since = 0.0
        self._agreed = Cause.NONE
        self._state = "loading"
        self._place = "the first step, then saving"
        self._leaving = False
        self._lines: list[threading.Thread] = []
        self._agree: Callable[[int], int] = int
        self._store: AlarmStore | None = None
        self._main = threading.get_ident()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._before: dict[int, Any] = {}
        self._wakeup_before = -1
        self._bytes, self._kernel_end = socket.socketpair()

    @property
    def agreed(self) -> Cause:
        """Why all ranks stop; NONE while they go on."""
        return self._agreed

    def __enter__(self) -> Self:
        self._kernel_end.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._kernel_end.fileno(), warn_on_full_buffer=False)
        for number in (*_CAUSES, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                self._before[number] = signal.signal(number, self._handle)
        self._thread = threading.Thread(target=self._watch, name="stop-requests", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._state = "closing"
        self._over.set()
        self._kernel_end.send(b"\0")
        if self._thread is not None:
            self._thread.join()  # before the handlers go: it sends signals to this process
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        self._bytes.close()
        self._kernel_end.close()
        for line in self._lines:
            line.join(_SAY_S)

    @contextmanager
    def shared(self, store: AlarmStore | None, agree: Callable[[int], int]) -> Iterator[None]:
        """Joins the other ranks for the context: ``agree`` returns the largest of all ranks' numbers, a collective.

        ``store`` (used by nobody else) tells them of a signal while they load; None for a rank on its own.

        Raises:
            StopRun: in the place of an error that comes from a rank that was told to stop and has left a collective.
        """
        self._store, self._agree = store, agree
        try:
            yield
        except Exception as error:
            told = self._told() if self._state == "loading" else Cause.NONE
            if told is not Cause.NONE:
                raise StopRun(told) from error
            raise

    def enter_phase(self, phase: str, step: int | None) -> None:
        """Says what the rank is doing, for the line that answers a signal."""
        if step is not None:
            self._place = "the checkpoint" if phase == "checkpoint" else f"step {step}, then saving"

    def begin_steps(self) -> None:
        """From here on a signal is a request; every rank calls it.

        Raises:
            StopRun: on every rank, where one was asked to stop before.
        """
        self._state = "steps"
        self._step_began = time.monotonic()
        self._agreed = Cause(self._agree(self._cause))
        if self._agreed:
            if self._cause is Cause.NONE:
                self._tell(f"{self._agreed.text} on another rank while loading: {_NOTHING}")
            raise StopRun(self._agreed)

    def requested(self) -> bool:
        """Returns whether the run is to end now, the same on every rank; a collective, called at the end of a step.

        The time limit asks for it when what is left of it is shorter than the longest of the latest 10 steps.
        """
        now = time.monotonic()
        self._durations_s.append(now - self._step_began)
        self._step_began = now
        cause = self._cause
        if self._limit_s and now - self._began + max(self._durations_s) > self._limit_s:
            cause = max(cause, Cause.TIME_LIMIT)
        self._agreed = Cause(self._agree(cause))
        return self._agreed is not Cause.NONE

    def end_steps(self) -> None:
        """Says that the last step is done: what follows is the end in any case."""
        self._state = "closing"

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Python's own handler, in the main thread: the thread does the rest."""
        del frame
        if self._state == "loading" and number in _CAUSES and not self._leaving:
            self._leaving = True  # a second one must not interrupt what the first one's unwinding closes
            raise StopRun(_CAUSES[signal.Signals(number)])

    def _watch(self) -> None:
        while not self._over.is_set():
            if select.select([self._bytes], [], [], _POLL_S)[0]:
                for number in self._bytes.recv(64):
                    self._receive(number)
            if self._state == "loading":
                self._look_around()

    def _receive(self, number: int) -> None:
        if number == signal.SIGHUP:
            self._tell("SIGHUP: the terminal is gone, the run goes on")
        cause = _CAUSES.get(number)  # type: ignore[call-overload]
        if cause is None:
            return
        now = time.monotonic()
        if self._cause is Cause.NONE:
            self._cause, self._since = cause, now
            self._answer(cause)
        elif cause is not Cause.SIGUSR1 and now - self._since > _SAME_PRESS_S:
            self._end(cause.exit_code)
        else:
            self._cause = max(self._cause, cause)

    def _answer(self, cause: Cause) -> None:
        again = "press Ctrl-C again to end at once" if cause is Cause.SIGINT else "a second signal ends it at once"
        if self._state == "loading" or self._leaving:
            self._tell(f"{cause.text} while loading: {_NOTHING}")
            self._set(cause)
        elif self._state == "steps":
            self._tell(f"{cause.text}: finishing {self._place}; {again}")
        else:
            self._tell(f"{cause.text}: the last step is done, the run is closing; {again}")

    def _look_around(self) -> None:
        """While loading: another rank was told to stop, or this one was and does not come out of a call."""
        if self._cause is not Cause.NONE:
            patience_s = _UNWIND_S if self._leaving else _STUCK_S
            if time.monotonic() - self._since > patience_s:
                self._end(self._cause.exit_code)
        elif number := _SIGNALS.get(self._told()):
            signal.pthread_kill(self._main, number)

    def _told(self) -> Cause:
        try:
            if self._store is not None and self._store.check([_TOLD]):
                return Cause(int(self._store.get(_TOLD)))
        except (RuntimeError, ValueError):  # the store's home has ended
            self._store = None
        return Cause.NONE

    def _set(self, cause: Cause) -> None:
        try:
            if self._store is not None:
                self._store.set(_TOLD, str(int(cause)))
        except RuntimeError:
            self._store = None

    def _tell(self, line: str) -> None:
        if self._say is not None:  # a thread of its own: a terminal that takes nothing must not hide the next signal
            self._lines.append(threading.Thread(target=self._say, args=(line,), daemon=True))
            self._lines[-1].start()

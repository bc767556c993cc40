"""Ends a run that hangs, and says on every rank what it was waiting for.

Each rank's watchdog is a daemon thread that looks at one attribute: what the rank is doing and since when. The trainer
moves it on by entering phases (report/timer.py), and around single calls with ``waiting``; both cost an attribute
write. A rank that stays in one activity for longer than the timeout says so and raises an alarm in the store that all
ranks share; every other rank then adds where it stands, however busy it is, and each ends its process. Ranks that do
not answer the alarm are named: their process or their node is lost.

The collective need not name itself: the main thread's stack does. Time is counted in the thread's own wake-ups: while
the process is suspended (SIGSTOP, scontrol suspend, a paused machine) none passes. A second line stands behind the
thread, also while a C++ call holds the interpreter: a process that misses its heartbeats (second_line.py).

This file does NOT print (the caller hands in a function) and knows neither models nor checkpoints.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol, Self

from aer_megatron.parallel import second_line

HANG_EXIT_CODE = 124  # that of timeout(1)

_ALARM = "aer_megatron/hang"
_SECOND_LINE_S = 15.0  # how much later than the thread the second line ends it: a loaded machine may starve the thread
_GRACE_PERIODS = 4  # how long a rank stays after its report, so that the others see the alarm before the launcher acts
# files whose functions are the calls that a rank can wait in, and helpers in them that name nothing
_CALL_FILES = ("/distributed_c10d.py", "/p2p_communication.py", "/http/client.py", "/urllib/request.py")
_HELPERS = ("_read_status", "begin", "do_open")


class AlarmStore(Protocol):
    """What the ranks share: the part of a torch.distributed store that is used."""

    def check(self, keys: list[str]) -> bool: ...
    def get(self, key: str) -> bytes: ...
    def set(self, key: str, value: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Activity:
    """What a rank is doing, and since when (``time.monotonic``). Example: ``Activity("train", 3, None, 12.5)``."""

    phase: str
    step: int | None
    call: str | None
    since: float


class Watchdog:
    """Watches the thread that made it. A ``timeout_s`` of 0 switches everything off but the attribute writes.

    Args:
        rank: of this process, for the report.
        num_ranks: that share the store.
        timeout_s: longest stay in one phase or one call.
        say: takes the report, a text of several lines; called from the watchdog's thread.
        store: shared by all ranks and used by nobody else (a clone), or None for a rank on its own.
        advice: called for the report's last line, which says where the run can go on; must not communicate.
        stop: ends the process; replaced in tests.
    """

    def __init__(
        self,
        *,
        rank: int,
        num_ranks: int,
        timeout_s: float,
        say: Callable[[str], None],
        store: AlarmStore | None,
        advice: Callable[[], str],
        stop: Callable[[int], Any] = os._exit,
    ) -> None:
        self._rank = rank
        self._num_ranks = num_ranks
        self._timeout_s = timeout_s
        self._say = say
        self._store = store
        self._advice = advice
        self._stop = stop
        self._period_s = min(3.0, timeout_s / 10)
        self._main = threading.get_ident()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._activity = Activity("start", None, None, time.monotonic())
        self._waited_s = 0.0  # in that activity, as the thread counts it
        self._heartbeat: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        if self._timeout_s:
            self._start_second_line()
            self._thread = threading.Thread(target=self._watch, name="hang-watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        self._end_second_line()

    def enter_phase(self, phase: str, step: int | None) -> None:
        """Says that the rank has moved on; also cancels the call it was in."""
        self._activity = Activity(phase, step, None, time.monotonic())

    @contextmanager
    def waiting(self, call: str) -> Iterator[None]:
        """Names a call that may hang: a collective, an HTTP request. Works nested; the innermost one counts."""
        before = self._activity
        self._activity = Activity(before.phase, before.step, call, time.monotonic())
        try:
            yield
        finally:
            self._activity = Activity(before.phase, before.step, before.call, time.monotonic())

    def _watch(self) -> None:
        seen, last = self._activity, time.monotonic()
        while not self._over.wait(self._period_s):
            self._beat()
            now, activity = time.monotonic(), self._activity
            since = last if activity is seen else max(last, activity.since)
            before_s = self._waited_s if activity is seen else 0.0
            self._waited_s = second_line.count(now - since, self._period_s) + before_s
            seen, last = activity, now
            late = self._waited_s > self._timeout_s
            if late or self._alarm_raised():
                self._end(late)
                break

    def _end(self, late: bool) -> None:
        if late:
            self._raise_alarm()
        self._answer_alarm()
        self._say(self._report(late))
        self._over.wait(self._period_s * _GRACE_PERIODS)
        silent = self._silent_ranks()
        if silent:
            self._say(
                f"[rank {self._rank}] hang watchdog: no word from ranks {', '.join(map(str, silent))}: "
                "their processes or nodes are lost or cut off"
            )
        self._stop(HANG_EXIT_CODE)

    def _report(self, late: bool) -> str:
        activity, stack = self._activity, self._main_stack()
        call = " in ".join(filter(None, (activity.call, call_name(stack))))
        step = "" if activity.step is None else f" of step {activity.step}"
        what = f"waits in {call}" if call else "is in no collective or HTTP call that Python sees"
        why = f"longer than run.hang_timeout_s={self._timeout_s:g}" if late else "another rank hangs"
        lines = [
            f"hang watchdog: phase {activity.phase}{step}: {what}, for {self._waited_s:.1f} s ({why})",
            "stack of the main thread, innermost call last:",
            *(line for part in stack for line in _lines(part)),
            f"{self._advice()}; if the run was only slow, raise run.hang_timeout_s",
        ]
        return "\n".join(f"[rank {self._rank}] {line}" for line in lines)

    def _main_stack(self) -> list[traceback.FrameSummary]:
        frame: FrameType | None = sys._current_frames().get(self._main)
        return list(traceback.extract_stack(frame)) if frame else []

    def _alarm_raised(self) -> bool:
        try:
            return self._store is not None and self._store.check([_ALARM])
        except RuntimeError:  # the store lives in rank 0 or the launcher: its end is reported by torch
            return False

    def _raise_alarm(self) -> None:
        try:
            if self._store is not None:
                self._store.set(_ALARM, str(self._rank))
        except RuntimeError:
            self._say(f"[rank {self._rank}] hang watchdog: the store of all ranks is gone, the others cannot be told")

    def _answer_alarm(self) -> None:
        try:
            if self._store is not None:
                self._store.set(f"{_ALARM}/{self._rank}", "")
        except RuntimeError:  # said by _raise_alarm, or by torch
            return

    def _silent_ranks(self) -> list[int]:
        """Returns the ranks that have not answered the alarm; none where the store cannot be asked."""
        try:
            if self._store is None:
                return []
            return [rank for rank in range(self._num_ranks) if not self._store.check([f"{_ALARM}/{rank}"])]
        except RuntimeError:
            return []

    def _start_second_line(self) -> None:
        faulthandler.register(signal.SIGUSR2, file=2, all_threads=True, chain=True)
        limit_s = self._timeout_s + _SECOND_LINE_S
        program = [sys.executable, "-I", "-S", str(Path(second_line.__file__))]
        try:
            self._heartbeat = subprocess.Popen(
                [*program, str(os.getpid()), str(limit_s), str(self._period_s)],
                stdin=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,  # out of reach of the terminal's signals
            )
        except OSError as error:
            self._say(f"[rank {self._rank}] hang watchdog: no process can be started ({error}); it has no second line")
            return
        assert self._heartbeat.stdin is not None
        os.set_blocking(self._heartbeat.stdin.fileno(), False)

    def _beat(self) -> None:
        """Says that this thread, which needs the interpreter, has come round again."""
        if self._heartbeat is not None and self._heartbeat.stdin is not None:
            with contextlib.suppress(OSError):  # it has ended, or is suspended with a full pipe
                os.write(self._heartbeat.stdin.fileno(), b".")

    def _end_second_line(self) -> None:
        if self._heartbeat is not None and self._heartbeat.stdin is not None:
            self._heartbeat.stdin.close()  # which ends it
            self._heartbeat.wait()
            faulthandler.unregister(signal.SIGUSR2)


def call_name(stack: list[traceback.FrameSummary]) -> str | None:
    """Returns the innermost collective or HTTP call of a stack, as ``all_reduce``; None without one."""
    for part in reversed(stack):
        if part.filename.endswith(_CALL_FILES) and part.name not in _HELPERS:
            return part.name
    return None


def distributed_store() -> AlarmStore | None:
    """Returns a connection of its own to the default process group's store; None for a process on its own."""
    import torch.distributed as dist

    if dist.get_world_size() == 1:
        return None
    store: Any = dist.distributed_c10d._get_default_store()
    clone: AlarmStore = store.clone()
    return clone


def _lines(part: traceback.FrameSummary) -> list[str]:
    place = f'  File "{part.filename}", line {part.lineno}, in {part.name}'
    return [place, f"    {part.line}"] if part.line else [place]

"""Ends a process whose interpreter is held: the second line behind the hang watchdog's thread.

A C++ call that keeps the interpreter to itself stops every Python thread, the watchdog's as well. So a small process of
its own listens for the thread's heartbeats. faulthandler's timer would do it inside the process, but counts the time
during which the process was suspended (SIGSTOP, scontrol suspend, a paused machine), and ends it when it is woken.

This file is run as a program and imports the standard library alone: ``second_line.py PID LIMIT_S PERIOD_S``.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from pathlib import Path

LATE_PERIODS = 5  # a wake-up that is later than so many periods has slept: that time is nobody's delay
_DUMP_S = 5.0  # for the traces of all threads


def count(gap_s: float, period_s: float) -> float:
    """Returns how much of the time between two wake-ups, ``period_s`` apart by plan, a process was awake."""
    return gap_s if gap_s <= LATE_PERIODS * period_s else period_s


def listen(pid: int, limit_s: float, period_s: float) -> None:
    """Waits for the end of standard input; ends process ``pid``, its parent, after ``limit_s`` without a byte from it.

    SIGUSR2 first, for which faulthandler writes every thread's stack without asking the interpreter, then SIGKILL.
    """
    silent_s, last = 0.0, time.monotonic()
    while silent_s <= limit_s:
        heard = select.select([0], [], [], period_s)[0]
        now = time.monotonic()
        if heard:
            if not os.read(0, 4096):
                return
            silent_s = 0.0
        elif not is_stopped(pid):
            silent_s += count(now - last, period_s)
        last = now
    for number, patience_s in ((signal.SIGUSR2, _DUMP_S), (signal.SIGKILL, 0.0)):
        if os.getppid() == pid:  # else it has ended, and its number may be another's
            os.kill(pid, number)
        select.select([0], [], [], patience_s)


def is_stopped(pid: int) -> bool:
    """Returns whether the process is suspended by a signal or a debugger."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] in (b"T", b"t")
    except (OSError, IndexError):
        return False


if __name__ == "__main__":
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):  # they are the rank's business
        signal.signal(ignored, signal.SIG_IGN)
    listen(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))

"""Runs one command and ends it, with everything it started, when the parent is gone: ``python guard.py COMMAND ...``

Standard input is the parent's lifeline: at its end - the parent closed it or died, even by SIGKILL - the command's
process group gets SIGTERM and, ``GRACE_S`` later, SIGKILL. The exit code is the command's. This file is run as a script
in a process of its own and needs nothing but the standard library.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time

GRACE_S = 5.0
_POLL_S = 0.2


def main(command: list[str]) -> int:
    """Returns the exit code of ``command``."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: end_group(child))
    while child.poll() is None:
        ready, _, _ = select.select([0], [], [], _POLL_S)
        if ready and not os.read(0, 1024):
            end_group(child)
    end_group(child)  # what outlives its leader
    return child.returncode


def end_group(child: subprocess.Popen[bytes]) -> None:
    """Returns when no process of the child's group is left."""
    deadline = time.monotonic() + GRACE_S
    number = signal.SIGTERM
    while True:
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            child.poll()
            return
        except PermissionError:  # only zombies of the group are left on some systems
            child.poll()
            return
        # SIGTERM once, then look (signal 0) until the grace is over, then SIGKILL
        number = signal.Signals(signal.SIGKILL) if time.monotonic() > deadline else 0  # type: ignore[assignment]
        child.poll()
        time.sleep(_POLL_S / 4)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

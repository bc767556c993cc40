"""The main program of a rank of ``aer launch``: ends with its launcher, then runs a module or a script.

python -m aer_megatron.launch.rank_main LAUNCHER_PID -m MODULE [ARGUMENTS]
python -m aer_megatron.launch.rank_main LAUNCHER_PID SCRIPT.py [ARGUMENTS]
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
from collections.abc import Sequence

from aer_megatron.console.failures import run_command

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # blocked while a rank starts

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent(parent: int) -> None:
    """Asks the kernel to end this process with SIGKILL when its parent, process ``parent``, ends in whatever way.

    Raises:
        OSError: the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it ended before the kernel was asked
        os.kill(os.getpid(), signal.SIGKILL)


def run(arguments: Sequence[str]) -> int:
    """Runs the module or script as the main program, and returns 0."""
    end_with_parent(int(arguments[0]))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    if arguments[1] == "-m":
        sys.argv = list(arguments[2:])  # runpy puts the module's path in the first place
        runpy.run_module(arguments[2], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(arguments[1:])
        sys.path[0] = os.path.dirname(os.path.abspath(arguments[1]))
        runpy.run_path(arguments[1], run_name="__main__")
    return 0


if __name__ == "__main__":
    given = sys.argv[1:]
    sys.exit(run_command(lambda edge: run(given)))

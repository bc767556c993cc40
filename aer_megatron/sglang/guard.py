"""Runs one command and ends it, with everything it started, when the parent is gone: ``python guard.py COMMAND ...``

The first line of standard input is a secret, or empty: the command finds it in a file that only this user can read and
whose name replaces the word @KEY_FILE@.

Standard input is the parent's lifeline: at its end - the parent closed it or died, even by SIGKILL - the command's
process group gets SIGTERM and, ``GRACE_S`` later, SIGKILL. What a killed server cannot remove itself goes too: the
command's temporary folder (TMPDIR is one of its own) and the shared memory that only its processes had mapped. The exit
code is the command's. This file is run as a script in a process of its own and needs nothing but the standard library.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GRACE_S = 5.0
_POLL_S = 0.2
_LOOK_S = 2.0  # how often the shared memory of the command is listed: once it is dead, nobody can tell
_SHARED = "/dev/shm/"
_PROCESSES = Path("/proc")
KEY_FILE = "@KEY_FILE@"  # stands for the file's name in a command


def main(command: list[str]) -> int:
    """Returns the exit code of ``command``."""
    folder = tempfile.mkdtemp(prefix="aer-")
    secret = read_secret()
    if secret:
        key_file = Path(folder, "key")
        key_file.touch(0o600)
        key_file.write_text(secret, encoding="ascii")
        command = [str(key_file) if word == KEY_FILE else word for word in command]
    child = subprocess.Popen(["env", f"TMPDIR={folder}", *command], stdin=subprocess.DEVNULL, start_new_session=True)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: end_group(child))
    mapped: set[str] = set()
    looked = 0.0
    while child.poll() is None:
        ready, _, _ = select.select([0], [], [], _POLL_S)
        is_over = bool(ready) and not os.read(0, 1024)
        if is_over or time.monotonic() > looked + _LOOK_S:
            mapped |= shared_files(child.pid)
            looked = time.monotonic()
        if is_over:
            end_group(child)
    end_group(child)  # what outlives its leader
    for path in mapped - shared_files():
        Path(path).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    return child.returncode


def read_secret() -> str:
    """Returns the first line of standard input, read byte by byte: what follows is the lifeline's."""
    line = b""
    while (piece := os.read(0, 1)) not in (b"", b"\n"):
        line += piece
    return line.decode("ascii")


def end_group(child: subprocess.Popen[bytes]) -> None:
    """Ends the child's process group and waits until none of it is left."""
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


def shared_files(group: int | None = None) -> set[str]:
    """Returns the shared memory files that processes of a group, or any, have mapped; none where /proc is not."""
    found = set()
    for entry in _PROCESSES.glob("[0-9]*"):
        try:
            if group is not None and os.getpgid(int(entry.name)) != group:
                continue
            lines = (entry / "maps").read_text(errors="replace").splitlines()
        except OSError:  # it ended, or is another user's
            continue
        found |= {_SHARED + line.partition(_SHARED)[2] for line in lines if _SHARED in line}
    return {path for path in found if not path.endswith(" (deleted)")}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Small programs for ranks, which say in a folder where they are; they import no torch."""

from __future__ import annotations

import time
from pathlib import Path

PREAMBLE = """\
import os, signal, sys, time
rank, folder = os.environ["RANK"], sys.argv[1]
def place(name, text=""):
    path = os.path.join(folder, name + rank)
    open(path + ".new", "w").write(text)
    os.replace(path + ".new", path)
"""
# stops as the trainer does: the first signal after a step, the second one at once
STOPPING = """\
seen = []
def stop(number, frame):
    seen.append(number)
    place(f"signal{len(seen)}-", str(int(number)))
    if len(seen) == 2 and number != signal.SIGUSR1:
        os._exit(128 + number)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, stop)
place("ready", str(os.getpid()))
while not seen or not os.path.exists(os.path.join(folder, "step_done")):
    time.sleep(0.02)
sys.exit({signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 0}[seen[0]])
"""


def write_program(folder: Path, text: str) -> list[str]:
    """Returns the arguments of ``aer launch`` for a rank that runs ``text`` after the preamble."""
    path = folder / "program.py"
    path.write_text(PREAMBLE + text, encoding="utf-8")
    return [str(path), str(folder)]


def await_file(path: Path, timeout_s: float = 60.0) -> str:
    """Returns the text of a file once it is there."""
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} does not appear")
        time.sleep(0.02)
    return path.read_text(encoding="utf-8")


def await_end(pid: int, timeout_s: float = 60.0) -> None:
    """Returns once process ``pid`` has ended."""
    deadline = time.monotonic() + timeout_s
    while is_running(pid):
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {pid} does not end")
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Returns whether process ``pid`` runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False

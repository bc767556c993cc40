"""What a run leaves on the machine: processes, listening ports, shared memory and temporary files.

Everything that a run starts inherits an environment variable with a mark of its own; a process that carries the mark is
the run's, whoever its parent is. While the run lasts, the ports and the shared memory of those processes are listed.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Self

_INTERVAL_S = 0.1
_MARK = "AER_TEST_RUN"
_SHARED = "/dev/shm/"
_LISTENING = "0A"


class Traces:
    """Watches a run; a ``with`` block around its processes.

    Args:
        temporary: becomes the run's TMPDIR.
    """

    def __init__(self, temporary: Path) -> None:
        temporary.mkdir(parents=True)
        self._temporary = temporary
        self._mark = f"{_MARK}={uuid.uuid4().hex}"
        self.seen_processes: set[int] = set()
        self.seen_ports: set[int] = set()
        self.seen_shared: set[str] = set()
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch)

    @property
    def variables(self) -> dict[str, str]:
        """Returns what the run's environment must hold."""
        name, _, value = self._mark.partition("=")
        return {name: value, "TMPDIR": str(self._temporary)}

    def __enter__(self) -> Self:
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._watcher.join()

    def left(self, *, wait_s: float = 10.0) -> dict[str, list[str]]:
        """Returns what is still there, by kind; empty when nothing is, at the latest after ``wait_s``."""
        deadline = time.monotonic() + wait_s
        while (found := self._left()) and time.monotonic() < deadline:
            time.sleep(_INTERVAL_S)
        return found

    def _left(self) -> dict[str, list[str]]:
        kinds = {
            "processes": [f"{pid} {_text(f'/proc/{pid}/cmdline')}" for pid in self._processes()],
            "ports": [str(port) for port in self.seen_ports & set(_listening().values())],
            "shared memory": [path for path in self.seen_shared if Path(path).exists()],
            "temporary files": [str(path) for path in self._temporary.iterdir()],
        }
        return {kind: found for kind, found in kinds.items() if found}

    def _watch(self) -> None:
        while not self._over.wait(_INTERVAL_S):
            processes = self._processes()
            listening = _listening()
            self.seen_processes.update(processes)
            for pid in processes:
                self.seen_ports.update(listening[inode] for inode in _sockets(pid) if inode in listening)
                lines = _text(f"/proc/{pid}/maps").splitlines()
                shared = {_SHARED + line.partition(_SHARED)[2] for line in lines if _SHARED in line}
                self.seen_shared |= {path for path in shared if not path.endswith(" (deleted)")}

    def _processes(self) -> list[int]:
        names = [name for name in os.listdir("/proc") if name.isdigit()]
        return [int(name) for name in names if self._mark in _text(f"/proc/{name}/environ").split("\0")]


def _sockets(pid: int) -> list[str]:
    """Returns the inodes of a process's sockets."""
    found = []
    try:
        for entry in os.scandir(f"/proc/{pid}/fd"):
            target = os.readlink(entry.path)
            if target.startswith("socket:["):
                found.append(target[len("socket:[") : -1])
    except OSError:
        pass
    return found


def _listening() -> dict[str, int]:
    """Returns the port of every listening TCP socket, by inode."""
    rows = [line.split() for name in ("tcp", "tcp6") for line in _text(f"/proc/net/{name}").splitlines()[1:]]
    return {row[9]: int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == _LISTENING}


def _text(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""

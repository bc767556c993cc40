"""The processes of a run as /proc shows them: which there are, what each of them is, and what it holds."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Role = Literal["launcher", "rank", "verifier guard", "verifier", "guard", "server", "other"]


@dataclass(frozen=True, slots=True)
class RunProcess:
    """One process below a launcher.

    ``rank`` is the training rank that it is or belongs to, ``guard`` the pid of the guard that started its server; -1
    where there is none.
    """

    pid: int
    role: Role
    rank: int
    command: str
    guard: int = -1


@dataclass(frozen=True, slots=True)
class Held:
    """What a process holds: memory in kB (resident, proportional, private), descriptors, threads."""

    rss_kb: int
    pss_kb: int
    uss_kb: int
    descriptors: int
    threads: int

    def table(self) -> dict[str, Any]:
        return asdict(self)


def run_processes(launcher: int) -> list[RunProcess]:
    """Returns the launcher and everything below it that runs now, parents before children."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (parent := _parent(int(entry.name))):
            children.setdefault(parent, []).append(int(entry.name))
    found: list[RunProcess] = []
    waiting = [(launcher, RunProcess(0, "other", -1, ""))]
    while waiting:
        pid, parent_process = waiting.pop(0)
        command = _read(pid, "cmdline").replace(b"\0", b" ").decode(errors="replace").strip()
        if not command:  # a zombie, or gone
            continue
        process = _classify(pid, command, parent_process, launcher)
        found.append(process)
        waiting += [(child, process) for child in sorted(children.get(pid, []))]
    return found


def processes_naming(path: Path) -> list[RunProcess]:
    """Returns the processes that have ``path`` as a word of their command line: launcher and ranks of a run file."""
    found = []
    for entry in Path("/proc").iterdir():
        words = _read(int(entry.name), "cmdline").split(b"\0") if entry.name.isdigit() else []
        if str(path).encode() in words:
            found.append(RunProcess(int(entry.name), "other", -1, b" ".join(words).decode(errors="replace")))
    return found


def end_all(processes: Sequence[RunProcess], *, wait_s: float) -> list[str]:
    """Returns what was still there after ``wait_s``, by role and rank, once it is ended."""
    deadline = time.monotonic() + wait_s
    while (left := [process for process in processes if is_running(process.pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in left:
        kill(process.pid)
    return [f"{process.role} {process.rank}" for process in left]


def servers_below(pid: int) -> list[list[int]]:
    """Returns the processes of every SGLang server started by ``pid`` or below it, each server's main one first."""
    own = run_processes(pid)
    servers = ([item.pid for item in own if item.role == "server" and item.guard == guard.pid] for guard in own)
    return [server for server in servers if server]


def held_by(pid: int) -> Held | None:
    """Returns what a process holds; None where it is gone."""
    try:
        rollup = _fields(Path(f"/proc/{pid}/smaps_rollup").read_text())
        status = _fields(Path(f"/proc/{pid}/status").read_text())
        descriptors = len(os.listdir(f"/proc/{pid}/fd"))
        private = rollup["Private_Clean"] + rollup["Private_Dirty"]
        return Held(rollup["Rss"], rollup["Pss"], private, descriptors, status["Threads"])
    except (OSError, KeyError):
        return None


def kill(pid: int) -> bool:
    """Returns whether the process was there to take its SIGKILL."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def is_running(pid: int) -> bool:
    """Returns whether the process exists and is no zombie."""
    return bool(_read(pid, "cmdline"))


def _classify(pid: int, command: str, parent: RunProcess, launcher: int) -> RunProcess:
    role: Role = "other"
    rank, guard = parent.rank, parent.pid if parent.role == "guard" else parent.guard
    if pid == launcher:
        role = "launcher"
    elif "aer_megatron.rewards.guard" in command or parent.role == "verifier guard":
        role = "verifier guard" if parent.role == "rank" else "verifier"
    elif "sglang/guard.py" in command:
        role = "guard"
    elif parent.role in ("guard", "server"):
        role = "server"
    elif "aer_megatron.train" in command and parent.role == "launcher":
        role, rank = "rank", _rank(pid)
    return RunProcess(pid, role, rank, command, guard)


def _rank(pid: int) -> int:
    for variable in _read(pid, "environ").split(b"\0"):
        if variable.startswith(b"RANK="):
            return int(variable[5:])
    return 0


def _parent(pid: int) -> int:
    text = _read(pid, "stat")
    try:
        return int(text.rpartition(b")")[2].split()[1])
    except IndexError:
        return 0


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def _fields(text: str) -> dict[str, int]:
    """Returns "Name:   123 kB" lines as numbers."""
    table = {}
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdigit():
            table[name] = int(words[0])
    return table

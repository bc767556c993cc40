"""Training processes that get signals: started without a launcher, so that each rank's exit code is seen."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.support.runs import ROOT, environment

PATIENCE_S = 240.0


class Rank:
    """One training process, with what it says in files."""

    def __init__(self, folder: Path, command: list[str], variables: dict[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._out, self._err = folder / "stdout", folder / "stderr"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment() | variables, cwd=ROOT
            )

    @property
    def said(self) -> str:
        """Returns standard output and error so far."""
        return self._out.read_text(errors="replace") + self._err.read_text(errors="replace")

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def catches(self, number: signal.Signals) -> bool:
        """Returns whether the process has a handler for the signal by now."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
        return bool(int(caught.split()[1], 16) >> (number - 1) & 1)

    def wait(self) -> int:
        return self.process.wait(PATIENCE_S)

    def until(self, condition: Callable[[], bool]) -> None:
        """Returns when ``condition`` holds; fails where the process ends before."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert self.process.poll() is None, f"ended with {self.process.returncode}: {self.said[-2000:]}"
            assert time.monotonic() < deadline, self.said[-2000:]
            time.sleep(0.02)


@contextlib.contextmanager
def started(folder: Path, *arguments: object, ranks: int = 1) -> Iterator[list[Rank]]:
    """Starts the ranks of ``aer_megatron.train ARGUMENTS``; kills those that are left at the end."""
    command = [sys.executable, "-m", "aer_megatron.train", *map(str, arguments)]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    every: list[Rank] = []
    try:
        for rank in range(ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            every.append(Rank(folder / f"rank{rank}", command, place if ranks > 1 else {}))
        yield every
    finally:
        for started_rank in every:
            started_rank.process.kill()
            started_rank.process.wait()


def num_lines(file: Path) -> int:
    """Returns how many lines a file has so far; 0 where there is none."""
    return file.read_bytes().count(b"\n") if file.is_file() else 0

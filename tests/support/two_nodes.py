"""Two "nodes" on one machine: network namespaces joined by a cable, or two loopback addresses where those are refused.

A node's processes are found by a word in their environment and, in a namespace, by that: nothing else is ended.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

WORD = "AER_TEST_NODE"


@dataclass
class Node:
    """One node; ``namespace`` is empty for a loopback address."""

    address: str
    namespace: str
    word: str = field(default_factory=lambda: uuid.uuid4().hex)

    def start(self, command: Sequence[str], environment: Mapping[str, str], log: IO[str]) -> subprocess.Popen[str]:
        """Returns the command, running on this node."""
        enter = ["ip", "netns", "exec", self.namespace] if self.namespace else []
        return subprocess.Popen(
            [*enter, *command],
            env={**environment, WORD: self.word},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def pids(self) -> set[int]:
        """Returns the node's processes that still run."""
        mark = f"{WORD}={self.word}".encode()
        found = set()
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit() and folder.name != str(os.getpid()):
                try:
                    marked = mark in (folder / "environ").read_bytes().split(b"\0")
                    zombie = (folder / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
                except OSError:  # it has ended meanwhile
                    continue
                if marked and not zombie:
                    found.add(int(folder.name))
        if self.namespace:
            found |= {int(pid) for pid in _ip("netns", "pids", self.namespace).split()}
        return found

    def ranks(self) -> set[int]:
        """Returns the node's ranks that still run."""
        found = set()
        for pid in self.pids():
            try:
                if b"TORCHELASTIC_RUN_ID=" in Path(f"/proc/{pid}/environ").read_bytes():
                    found.add(pid)
            except OSError:  # it has ended meanwhile
                continue
        return found

    def lose_power(self) -> None:
        """Ends every process of the node with SIGKILL."""
        for _ in range(50):
            pids = self.pids()
            if not pids:
                return
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.1)
        raise RuntimeError(f"processes {sorted(self.pids())} of {self.address} do not end")

    def pull_cable(self) -> None:
        """Takes the node off the network; namespaces only. No connection is told of it."""
        _ip("-n", self.namespace, "link", "set", "cable", "down")

    def plug_cable(self) -> None:
        _ip("-n", self.namespace, "link", "set", "cable", "up")


@dataclass
class Cluster:
    """Example: ``Cluster("namespaces", (Node("10.77.0.1", "aer12a"), Node("10.77.0.2", "aer12b")))``."""

    kind: str
    nodes: tuple[Node, Node]


@contextmanager
def two_nodes() -> Iterator[Cluster]:
    """Yields two nodes with nothing running on them, and ends what runs on them at the end."""
    names = tuple(f"aer{os.getpid()}{letter}" for letter in "ab")
    if _namespaces(names):
        cluster = Cluster("namespaces", (Node("10.77.0.1", names[0]), Node("10.77.0.2", names[1])))
    else:
        cluster = Cluster("loopback", (Node("127.0.0.1", ""), Node("127.0.0.2", "")))
    try:
        yield cluster
    finally:
        for node in cluster.nodes:
            node.lose_power()
            if node.namespace:
                _ip("netns", "delete", node.namespace)


def _namespaces(names: tuple[str, ...]) -> bool:
    """Returns whether the machine let two joined namespaces be made."""
    made: list[str] = []
    try:
        for name in names:
            _ip("netns", "add", name)
            made.append(name)
        _ip("-n", names[0], "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", names[1])
        for number, name in enumerate(names, start=1):
            _ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "cable")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", "cable", "up")
    except (OSError, subprocess.CalledProcessError):  # no iproute2, no root, or a container that forbids it
        for name in made:
            _ip("netns", "delete", name)
        return False
    return True


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout

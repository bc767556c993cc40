"""Sinks of a user's own, good and bad; the good ones write down every call in CALLS."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from aer_megatron.report.sinks.base import Record, Sink, SinkRun, step_of

CALLS: list[tuple[Any, ...]] = []


class Listing(Sink):
    """Local: called within the step."""

    def __init__(self, run: SinkRun, *, fails_at: int = -1) -> None:
        CALLS.append(("made", run.start_step))
        self.fails_at = fails_at

    def step(self, record: Record) -> None:
        CALLS.append(("step", record["step"]))
        if step_of(record) == self.fails_at:
            raise ConnectionError("server gone, key sk-abcdefghijklmnopqrstuv")

    def picture(self, file: Path) -> None:
        CALLS.append(("picture", file.name))

    def close(self, *, failed: bool) -> None:
        CALLS.append(("close", failed))


class Sent(Listing):
    remote = True

    def __init__(self, run: SinkRun, *, fails_at: int = -1) -> None:
        super().__init__(run, fails_at=fails_at)
        CALLS.append(("id", run.id, run.config))


class Hanging(Sink):
    remote = True
    go_on = threading.Event()

    def __init__(self, run: SinkRun) -> None:
        pass

    def step(self, record: Record) -> None:
        self.go_on.wait(60)


class Refusing(Listing):
    def __init__(self, run: SinkRun) -> None:
        raise ConnectionError("sk-abcdefghijklmnopqrstuv is no key")


class Unfinished(Sink):
    pass


class Absent(Listing):
    package = "no_such_package_of_anybody"
    install = "aer-megatron[absent]"

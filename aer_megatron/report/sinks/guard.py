"""Keeps a run from what its sinks do: a failure costs the sink's own lines, a slow call no time of a step."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aer_megatron.report.masking import mask_text
from aer_megatron.report.samples import Sample
from aer_megatron.report.sinks.base import Record, Sink, step_of

_LOG = logging.getLogger(__name__)
_WAITING_CALLS = 1000
_CLOSE_S = 60.0


class GuardedSink:
    """Hands calls to a sink until one fails, which is said once.

    Args:
        name: as in ``report.sinks``.
        first_step: records of earlier steps are not handed over.
    """

    def __init__(self, name: str, sink: Sink, *, first_step: int) -> None:
        self._name = name
        self._sink = sink
        self._first_step = first_step
        self._failed = False
        self._place = "the first step"

    def step(self, record: Record) -> None:
        if step_of(record) >= self._first_step:
            self._call("step", record)

    def picture(self, file: Path) -> None:
        self._call("picture", file)

    def samples(self, samples: Sequence[Sample]) -> None:
        self._call("samples", samples)

    def close(self, *, failed: bool) -> None:
        self._call("close", failed=failed)

    def _call(self, method: str, *given: Any, **named: Any) -> None:
        if self._failed:
            return
        if method == "step":
            self._place = f"step {step_of(given[0])}"
        try:
            getattr(self._sink, method)(*given, **named)
        except Exception as error:  # a user's code, a network, a disk: not what the run is for
            self._give_up(f"{type(error).__name__}: {error}")
            if method != "close":
                with contextlib.suppress(Exception):
                    self._sink.close(failed=True)

    def _give_up(self, reason: str) -> None:
        self._failed = True
        _LOG.warning(
            "report.sinks: %s ends at %s: %s; metrics.jsonl goes on", self._name, self._place, mask_text(reason)
        )


class ThreadedSink(GuardedSink):
    """Makes the calls in a thread of its own; ``close`` waits for them, for a minute."""

    def __init__(self, name: str, sink: Sink, *, first_step: int) -> None:
        super().__init__(name, sink, first_step=first_step)
        self._calls: queue.Queue[tuple[str, tuple[Any, ...], dict[str, Any]]] = queue.Queue(_WAITING_CALLS)
        self._thread = threading.Thread(target=self._run, name=f"sink-{name}", daemon=True)
        self._thread.start()

    def close(self, *, failed: bool) -> None:
        if self._failed:
            return  # it may never come back
        super().close(failed=failed)
        self._thread.join(_CLOSE_S)
        if self._thread.is_alive():
            self._give_up(f"it has not ended within {_CLOSE_S:g} s, and what it still holds is lost")

    def _call(self, method: str, *given: Any, **named: Any) -> None:
        if self._failed:
            return
        try:
            self._calls.put_nowait((method, given, named))
        except queue.Full:
            self._give_up(f"it does not keep up, {_WAITING_CALLS} calls wait")

    def _run(self) -> None:
        method = ""
        while method != "close" and not self._failed:
            method, given, named = self._calls.get()
            super()._call(method, *given, **named)

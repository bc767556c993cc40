"""The display of a running job, on rank 0's standard output."""

from __future__ import annotations

from aer_megatron.report.progress import open_progress
from aer_megatron.report.sinks.base import Record, Sink, SinkRun


class ConsoleSink(Sink):
    """A live table on a terminal, one plain line every few steps anywhere else."""

    def __init__(self, run: SinkRun) -> None:
        self._display = open_progress(run.name, run.num_steps)

    def step(self, record: Record) -> None:
        self._display.step(record)

    def close(self, *, failed: bool) -> None:
        self._display.close()

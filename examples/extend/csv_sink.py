"""A sink of your own: chosen metrics in a table that a spreadsheet reads.

[report]
sinks = ["console", "examples.extend.csv_sink:CsvSink"]
[report.sink_options."examples.extend.csv_sink:CsvSink"]
metrics = ["reward/mean", "entropy/token_mean"]

"""

from __future__ import annotations

import csv
from collections.abc import Sequence

from aer_megatron.report.sinks.base import Record, Sink, SinkRun, step_of


class CsvSink(Sink):
    """Appends a row per step to curves.csv in the run folder; a metric that a step lacks is an empty cell."""

    def __init__(self, run: SinkRun, *, metrics: Sequence[str] = ("reward/mean",)) -> None:
        self._metrics = metrics
        path = run.folder / "curves.csv"
        kept: list[list[str]] = []
        if run.start_step and path.is_file():  # steps from here on are made again
            with path.open(newline="", encoding="utf-8") as file:
                kept = [row for row in list(csv.reader(file))[1:] if int(row[0]) < run.start_step]
        self._file = path.open("w", newline="", encoding="utf-8")
        self._rows = csv.writer(self._file)
        self._rows.writerows([["step", *metrics], *kept])

    def step(self, record: Record) -> None:
        self._rows.writerow([step_of(record), *(record.get(name) for name in self._metrics)])
        self._file.flush()

    def close(self, *, failed: bool) -> None:
        self._file.close()

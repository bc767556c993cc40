"""TensorBoard: every number of metrics.jsonl as a scalar, alarms as text, the picture as an image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aer_megatron.report.metrics import Metric
from aer_megatron.report.sinks.base import Record, Sink, SinkRun, alarm_of, numbers, step_of

TENSORBOARD_FOLDER = "tensorboard"


class TensorBoardSink(Sink):
    """Writes events below ``run.folder``/tensorboard; those of ``run.start_step`` and later are purged first."""

    package = "tensorboard"
    install = "tensorboard"

    def __init__(self, run: SinkRun) -> None:
        # Importing it takes most of a second, which a run without events should not pay.
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(run.folder / TENSORBOARD_FOLDER), purge_step=run.start_step)
        self._step = run.start_step

    def step(self, record: Record) -> None:
        self._step = step_of(record)
        for name, value in numbers(record).items():
            self._writer.add_scalar(name, value, self._step)
        if alarm := alarm_of(record):
            self._writer.add_text(Metric.AER_ALARM, alarm, self._step)
        self._writer.flush()

    def picture(self, file: Path) -> None:
        from matplotlib.image import imread

        self._writer.add_image("report", imread(file), self._step, dataformats="HWC")

    def close(self, *, failed: bool) -> None:
        self._writer.close()

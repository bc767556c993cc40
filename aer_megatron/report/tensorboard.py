"""TensorBoard events of a run: every number of metrics.jsonl as a scalar, alarms as text."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aer_megatron.files.disk_space import lacks_space
from aer_megatron.report.metrics import Metric
from aer_megatron.report.writer import MetricValue

_LOG = logging.getLogger(__name__)
TENSORBOARD_FOLDER = "tensorboard"


class TensorBoardWriter:
    """Writes events below ``folder``/tensorboard; those of ``start_step`` and later are purged first.

    Raises:
        RuntimeError: the tensorboard package is not installed.
    """

    def __init__(self, folder: str | Path, *, start_step: int) -> None:
        try:
            # Importing it takes most of a second, which a run without events should not pay.
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise RuntimeError(
                f"report.tensorboard=true needs the package {error.name}; pip install tensorboard, or set "
                "report.tensorboard=false"
            ) from None
        self._writer: Any = SummaryWriter(str(Path(folder) / TENSORBOARD_FOLDER), purge_step=start_step)

    def write(self, record: Mapping[str, MetricValue]) -> None:
        """Adds the events of one normalised record; once the disk is full they end, with a warning."""
        if self._writer is None:
            return
        try:
            self._add(self._writer, record)
        except OSError as error:
            if not lacks_space(error):
                raise
            _LOG.warning("TensorBoard's events end at step %s: %s; metrics.jsonl goes on", record[Metric.STEP], error)
            self._writer = None

    def _add(self, writer: Any, record: Mapping[str, MetricValue]) -> None:
        step = record[Metric.STEP]
        assert isinstance(step, int)
        for name, value in record.items():
            if name == Metric.STEP or value is None:
                continue
            if not isinstance(value, str):
                writer.add_scalar(name, float(value), step)
            elif name == Metric.AER_ALARM:
                writer.add_text(name, value, step)
        writer.flush()

    def close(self) -> None:
        """Ends the file; a second call does nothing."""
        writer, self._writer = self._writer, None
        if writer is None:
            return
        try:
            writer.close()
        except OSError as error:
            if not lacks_space(error):
                raise
            _LOG.warning("TensorBoard's last events are lost: %s", error)

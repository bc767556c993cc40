"""TensorBoard events of a run: every number of metrics.jsonl as a scalar, alarms as text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from aer_megatron.report.metrics import Metric
from aer_megatron.report.writer import MetricValue

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
        self._writer = SummaryWriter(str(Path(folder) / TENSORBOARD_FOLDER), purge_step=start_step)

    def write(self, record: Mapping[str, MetricValue]) -> None:
        """Adds the events of one normalised record."""
        step = record[Metric.STEP]
        assert isinstance(step, int)
        for name, value in record.items():
            if name == Metric.STEP or value is None:
                continue
            if not isinstance(value, str):
                self._writer.add_scalar(name, float(value), step)
            elif name == Metric.AER_ALARM:
                self._writer.add_text(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

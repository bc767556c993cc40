"""One call per step for all that a user sees: metrics.jsonl, TensorBoard, the display, and a last picture.

    reporter.step(metrics) --normalize--> MetricsWriter, TensorBoardWriter, Progress
    reporter.close()       --------------> report.png

Ranks other than 0 hold a ``NullReporter``, so that the training loop needs no rank.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from aer_megatron.config import Config
from aer_megatron.files.disk_space import lacks_space
from aer_megatron.report.progress import NullProgress, Progress, open_progress
from aer_megatron.report.tensorboard import TensorBoardWriter
from aer_megatron.report.writer import MetricsWriter, mark_trained, normalize

_LOG = logging.getLogger(__name__)


class StepReporter(Protocol):
    """What the training loop needs of a reporter; a context manager that closes it."""

    def step(self, metrics: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class NullReporter:
    """Reports nothing: every rank but 0."""

    def step(self, metrics: Mapping[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class Reporter:
    """Reports the steps of one run folder; each part that is None is left out."""

    def __init__(
        self,
        writer: MetricsWriter,
        progress: Progress,
        *,
        tensorboard: TensorBoardWriter | None,
        picture: bool,
        on_first_step: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_first_step = on_first_step
        self._writer = writer
        self._progress = progress
        self._tensorboard = tensorboard
        self._picture = picture
        self._num_steps = 0

    @classmethod
    def open(cls, config: Config, *, folder: str | Path, num_steps: int, start_step: int) -> Self:
        """Returns a reporter with the parts that ``config.report`` asks for.

        Lines and events of ``start_step`` and later, left by an earlier launch, are dropped.

        Raises:
            ValueError: metrics.jsonl of an earlier launch is damaged before its last line.
            RuntimeError: ``report.tensorboard`` is on and the package is missing.
        """
        writer = MetricsWriter(folder)
        writer.truncate_from(start_step)
        tensorboard = TensorBoardWriter(folder, start_step=start_step) if config.report.tensorboard else None
        progress = open_progress(config.run.name, num_steps) if config.report.progress else NullProgress()
        return cls(
            writer,
            progress,
            tensorboard=tensorboard,
            picture=config.report.picture,
            on_first_step=partial(mark_trained, folder),
        )

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Records and shows one step.

        Raises:
            ValueError: ``step`` is missing or not beyond the last one, or a name or a value is not a
            metric's.
        """
        record = normalize(metrics)
        self._writer.write(record)
        if self._tensorboard is not None:
            self._tensorboard.write(record)
        self._progress.step(record)
        if not self._num_steps:
            self._on_first_step()
        self._num_steps += 1

    def close(self) -> None:
        """Ends the display and the event file and draws the picture; a second call does nothing.

        Raises:
            RuntimeError: the disk has no room for lines of metrics.jsonl that were written while it was full.
        """
        self._release()
        num_steps, self._num_steps = self._num_steps, 0
        self._writer.close()
        if self._picture and num_steps:
            # matplotlib takes half a second to import, and only this line needs it.
            from aer_megatron.report.picture import draw_report

            try:
                draw_report(self._writer.path.parent)
            except OSError as error:
                if not lacks_space(error):
                    raise
                _LOG.warning("no picture of the run: %s; aer report draws it later", error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._release()  # no picture: it could hide the error that ended the run
            with contextlib.suppress(RuntimeError, OSError):
                self._writer.close()

    def _release(self) -> None:
        self._progress.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

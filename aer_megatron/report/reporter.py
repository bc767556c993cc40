"""One call per step for all that a user sees: metrics.jsonl, the sinks, and a last picture.

    reporter.step(metrics) --normalize--> MetricsWriter, then every sink of report.sinks
    reporter.close()       --------------> report.png, which the sinks get as well, and report.html

Ranks other than 0 hold a ``NullReporter``, so that the training loop needs no rank.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from aer_megatron.config import Config
from aer_megatron.files.disk_space import lacks_space
from aer_megatron.report.samples import read_samples
from aer_megatron.report.sinks.base import SinkRun
from aer_megatron.report.sinks.guard import GuardedSink
from aer_megatron.report.sinks.opening import open_sinks
from aer_megatron.report.writer import MetricsWriter, mark_trained, normalize, recorded_config

_LOG = logging.getLogger(__name__)
_SAMPLES = 200  # handed to the sinks


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
    """Reports the steps of one run folder."""

    def __init__(
        self,
        writer: MetricsWriter,
        sinks: Sequence[GuardedSink],
        *,
        picture: bool,
        html: bool = False,
        on_first_step: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_first_step = on_first_step
        self._writer = writer
        self._sinks = sinks
        self._picture = picture
        self._html = html
        self._num_steps = 0

    @classmethod
    def open(cls, config: Config, *, folder: str | Path, num_steps: int, start_step: int) -> Self:
        """Returns a reporter with the sinks and the picture that ``config.report`` asks for.

        Lines and events of ``start_step`` and later, left by an earlier launch, are dropped.

        Raises:
            ValueError: metrics.jsonl of an earlier launch is damaged before its last line, or as ``open_sinks``.
            RuntimeError: a sink cannot start.
        """
        writer = MetricsWriter(folder)
        recorded_step = writer.last_step if start_step else -1
        writer.truncate_from(start_step)
        run = SinkRun(
            name=config.run.name,
            folder=Path(folder),
            start_step=start_step,
            num_steps=num_steps,
            config=recorded_config(config),
        )
        sinks = open_sinks(config.report, run, recorded_step=recorded_step)
        return cls(
            writer,
            sinks,
            picture=config.report.picture,
            html=config.report.html,
            on_first_step=partial(mark_trained, folder),
        )

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Records one step and hands it to the sinks.

        Raises:
            ValueError: ``step`` is missing or not beyond the last one, or a name or a value is not a
            metric's.
        """
        record = normalize(metrics)
        self._writer.write(record)
        for sink in self._sinks:
            sink.step(record)
        if not self._num_steps:
            self._on_first_step()
        self._num_steps += 1

    def close(self) -> None:
        """Draws picture and page and ends the sinks; a second call does nothing.

        Raises:
            RuntimeError: the disk has no room for lines of metrics.jsonl that were written while it was full.
        """
        num_steps, self._num_steps = self._num_steps, 0
        failed = True
        try:
            self._writer.close()
            if num_steps:
                self._draw(self._writer.path.parent)
                if self._sinks:
                    self._hand_over_samples()
            failed = False
        finally:
            self._end_sinks(failed=failed)

    def _draw(self, folder: Path) -> None:
        # matplotlib and pyarrow take half a second to import, and only these lines need them.
        try:
            if self._picture:
                from aer_megatron.report.picture import draw_report

                picture = draw_report(folder)
                for sink in self._sinks:
                    sink.picture(picture)
            if self._html:
                from aer_megatron.report.html import HTML_FILE, write_html

                write_html([folder], folder / HTML_FILE)
        except OSError as error:
            if not lacks_space(error):
                raise
            _LOG.warning("no picture of the run: %s; aer report draws it later", error)

    def _hand_over_samples(self) -> None:
        last = self._writer.last_step
        try:
            samples = list(
                itertools.islice(read_samples(self._writer.path.parent, steps=range(last, last + 1)), _SAMPLES)
            )
        except (ValueError, OSError):
            return  # none are kept, or their file is damaged: aer samples says how
        for sink in self._sinks if samples else ():
            sink.samples(samples)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._end_sinks(failed=True)  # no picture: it could hide the error that ended the run
            with contextlib.suppress(RuntimeError, OSError):
                self._writer.close()

    def _end_sinks(self, *, failed: bool) -> None:
        sinks, self._sinks = self._sinks, ()
        for sink in sinks:
            sink.close(failed=failed)

"""Weights & Biases: one W&B run for a run and all its resumes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aer_megatron.report.metrics import Metric
from aer_megatron.report.samples import Sample
from aer_megatron.report.sinks.base import (
    SAMPLE_COLUMNS,
    Record,
    Sink,
    SinkRun,
    alarm_of,
    numbers,
    sample_rows,
    step_of,
)


class WandbSink(Sink):
    """Sends to the project ``project``; further options are those of ``wandb.init``: entity, group, tags, mode.

    Server, key and mode may also come from W&B's own environment variables and login. Its files lie in
    ``run.folder``/wandb.
    """

    package = "wandb"
    install = "aer-megatron[wandb]"
    remote = True

    def __init__(self, run: SinkRun, *, project: str = "aer-megatron", **options: Any) -> None:
        import wandb

        self._image, self._table = wandb.Image, wandb.Table
        self._step = run.start_step
        self._run = wandb.init(
            **{
                "project": project,
                "name": run.name,
                "dir": str(run.folder),
                "config": dict(run.config),
                # standard output belongs to the display; the metadata holds the command line, secrets included
                "settings": wandb.Settings(console="off", x_disable_meta=True, x_save_requirements=False),
                "save_code": False,
                **options,
                "id": run.id,
                "resume": "allow" if run.start_step else None,
            }
        )

    def step(self, record: Record) -> None:
        self._step, alarm = step_of(record), alarm_of(record)
        self._run.log(numbers(record) | ({str(Metric.AER_ALARM): alarm} if alarm else {}), step=self._step)

    def picture(self, file: Path) -> None:
        self._run.log({"report": self._image(str(file))}, step=self._step)  # without it: a step of its own

    def samples(self, samples: Sequence[Sample]) -> None:
        table = self._table(columns=list(SAMPLE_COLUMNS), data=sample_rows(samples))
        self._run.log({"samples": table}, step=self._step)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))

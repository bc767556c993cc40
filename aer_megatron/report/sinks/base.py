"""The interface of a sink: a place to which a run's records go beside metrics.jsonl.

This file does NOT choose sinks (opening.py) or keep a run from their failures (guard.py).
"""

from __future__ import annotations

import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from aer_megatron.files.whole_files import replace_file
from aer_megatron.report.metrics import Metric
from aer_megatron.report.samples import Sample
from aer_megatron.report.writer import MetricValue

Record = Mapping[str, MetricValue]

RUN_ID_FILE = "run_id"
_RUN_ID_LENGTH = 32
_RUN_ID = re.compile(f"[0-9a-f]{{{_RUN_ID_LENGTH}}}")


@dataclass(frozen=True)
class SinkRun:
    """What a sink is told of its run.

    Attributes:
        name: ``run.name``.
        folder: the run's; a sink may keep files of its own there.
        start_step: the first step of this launch; above 0 the run goes on.
        num_steps: steps of the whole run.
        config: the resolved configuration as run.json has it: secrets are masked.
    """

    name: str
    folder: Path
    start_step: int
    num_steps: int
    config: Mapping[str, Any]

    @cached_property
    def id(self) -> str:
        """Returns 32 hexadecimal digits, new where the run begins anew and the same after every resume.

        They are kept in ``folder``/run_id, written when the first sink asks for them.
        """
        file = self.folder / RUN_ID_FILE
        if self.start_step and file.is_file():
            with file.open(encoding="ascii", errors="replace") as opened:
                kept = opened.read(_RUN_ID_LENGTH + 1)
            if _RUN_ID.fullmatch(kept):
                return kept
        made = uuid.uuid4().hex
        replace_file(file, made)
        return made


class Sink(ABC):
    """Takes the records of one run, on rank 0. Made as ``Class(run, **options)``, from ``[report.sink_options.NAME]``.

    What the constructor raises ends the run before its first step. What a method raises later is said once, and the
    sink gets no further call: the run goes on.

    Attributes:
        package: what must be importable, None where nothing is needed that the trainer does not need.
        install: what pip installs for it.
        remote: nothing that was sent can be taken back, and a call may take long. So calls come from a thread of their
            own, and a step that is made again after a resume is not handed over twice. Other sinks are called within
            the step, and are to drop what they hold of ``run.start_step`` and later.
    """

    package: ClassVar[str | None] = None
    install: ClassVar[str] = ""
    remote: ClassVar[bool] = False

    @abstractmethod
    def step(self, record: Record) -> None:
        """Takes one step: metrics by name, ``step`` among them; None is a number that was not finite."""

    def picture(self, file: Path) -> None:  # noqa: B027
        """Takes report.png, drawn at the end of a launch."""

    def samples(self, samples: Sequence[Sample]) -> None:  # noqa: B027
        """Takes some samples of the last step that has any, at the end of a launch."""

    def close(self, *, failed: bool) -> None:  # noqa: B027
        """Ends the sink; ``failed`` where an error ends the run."""


SAMPLE_COLUMNS = ("step", "set", "prompt", "answer", "completion", "reward", "reason", "advantage", "difficulty")


def sample_rows(samples: Sequence[Sample]) -> list[list[Any]]:
    """Returns a table of samples: a row each, columns as in ``SAMPLE_COLUMNS``."""
    return [[getattr(sample, name) for name in SAMPLE_COLUMNS] for sample in samples]


def numbers(record: Record) -> dict[str, float]:
    """Returns the numbers and flags of a record, without ``step`` and what was not finite."""
    return {
        name: float(value)
        for name, value in record.items()
        if name != Metric.STEP and value is not None and not isinstance(value, str)
    }


def step_of(record: Record) -> int:
    """Returns the step of a normalised record, which always has one."""
    step = record[Metric.STEP]
    assert isinstance(step, int)
    return step


def alarm_of(record: Record) -> str | None:
    """Returns the alarm of the step, None where there is none."""
    alarm = record.get(Metric.AER_ALARM)
    return alarm if isinstance(alarm, str) else None

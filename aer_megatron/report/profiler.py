"""A torch profiler over some steps of a run (``run.profile_steps``): every rank leaves a trace and a table.

RUN/profile/steps_5-7.rank0.json.gz    for https://ui.perfetto.dev or chrome://tracing; phases are ranges in it
RUN/profile/steps_5-7.rank0.txt        the ten operators that took longest themselves
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch.profiler import ProfilerActivity, profile, record_function

_LOG = logging.getLogger(__name__)
PROFILE_FOLDER = "profile"
_NUM_OPERATORS = 10


class StepProfiler:
    """Profiles steps ``steps[0]`` to ``steps[1]``, both included, as the phase timer tells of them; () profiles none.

    What cannot be written costs the profile, never the run.
    """

    def __init__(self, folder: str | Path, steps: Sequence[int], *, rank: int) -> None:
        self._steps = range(steps[0], steps[1] + 1) if steps else range(0)
        self._folder = Path(folder) / PROFILE_FOLDER
        self._name = f"steps_{self._steps.start}-{self._steps.stop - 1}.rank{rank}"
        self._speaks = rank == 0
        self._profile: Any = None
        self._phase = ExitStack()  # the range of the phase that is under way

    def enter_phase(self, phase: str, step: int | None) -> None:
        """Begins with the first phase of the first step, and ends with the first phase behind the last step."""
        self._phase.close()
        if self._profile is None and step in self._steps:
            self._profile = profile(activities=_activities())
            self._profile.start()
        elif self._profile is not None and step not in self._steps:
            self._finish()
        if self._profile is not None:
            self._phase.enter_context(record_function(f"step {step}: {phase}"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._phase.close()
        if self._profile is None:
            return
        if kind is None:
            self._finish()
        else:
            self._profile.stop()

    def _finish(self) -> None:
        done, self._profile, self._steps = self._profile, None, range(0)
        done.stop()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            done.export_chrome_trace(str(self._folder / f"{self._name}.json.gz"))
            (self._folder / f"{self._name}.txt").write_text(_longest_operators(done), encoding="utf-8")
        except (OSError, RuntimeError) as error:
            _LOG.warning("the profile could not be written: %s", error)
        else:
            if self._speaks:
                _LOG.warning("profile: %s", self._folder / f"{self._name}.txt")


def _activities() -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]


def _longest_operators(done: Any) -> str:
    averages = done.key_averages()
    averages[:] = [event for event in averages if not event.is_user_annotation]  # phases are no operators
    device = "device" if torch.cuda.is_available() else "cpu"
    table: str = averages.table(sort_by=f"self_{device}_time_total", row_limit=_NUM_OPERATORS, max_name_column_width=80)
    return table

"""Wall time per phase of a step and the peak memory of the process, under their metric names.

Times are of the calling process. Work that a device does after the phase has returned is counted in the phase
that waits for it.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from aer_megatron.report.metrics import Metric

PHASES = {
    "rollout": Metric.TIME_ROLLOUT,
    "reward": Metric.TIME_REWARD,
    "score": Metric.TIME_SCORE,
    "train": Metric.TIME_TRAIN,
    "sync": Metric.TIME_SYNC,
    "eval": Metric.TIME_EVAL,
    "checkpoint": Metric.TIME_CHECKPOINT,
}


class PhaseTimer:
    """Adds up seconds per phase: ``with timer.phase("rollout"): ...``, then ``timer.take()`` once a step.

    A phase may be entered several times in a step; phases do not nest. ``on_phase`` is told (phase, step) whenever one
    begins and ("between phases", step) when it ends; steps are counted by ``take`` from ``first_step``.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        *,
        on_phase: Callable[[str, int | None], None] | None = None,
        first_step: int = 0,
    ) -> None:
        self._clock = clock
        self._on_phase = on_phase or (lambda phase, step: None)
        self._step = first_step
        self._seconds: dict[Metric, float] = {}
        self._active: str | None = None
        self._step_start = clock()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Returns a context whose duration is added to phase ``name``, also when its body raises.

        Raises:
            ValueError: no such phase.
        """
        if name not in PHASES:
            raise ValueError(f"unknown phase {name!r}; use one of {', '.join(PHASES)}")
        assert self._active is None, f"phase {name} inside phase {self._active}"
        self._active = name
        self._on_phase(name, self._step)
        start = self._clock()
        try:
            yield
        finally:
            metric = PHASES[name]
            self._seconds[metric] = self._seconds.get(metric, 0.0) + self._clock() - start
            self._active = None
            self._on_phase("between phases", self._step)

    def take(self, *, num_tokens: int | None = None) -> dict[str, float]:
        """Returns the ``time/*`` metrics since the last call, and starts over.

        A phase that was not entered has no entry; ``num_tokens`` (of all ranks) adds tokens per second.
        """
        now = self._clock()
        step_s = now - self._step_start
        metrics: dict[str, float] = {str(name): seconds for name, seconds in self._seconds.items()}
        metrics[Metric.TIME_STEP] = step_s
        metrics[Metric.TIME_PEAK_RSS_GB] = peak_rss_gb()
        if num_tokens is not None and step_s > 0:
            metrics[Metric.TIME_TOKENS_PER_S] = num_tokens / step_s
        self._seconds = {}
        self._step_start = now
        self._step += 1
        return metrics


def peak_rss_gb() -> float:
    """Returns the largest resident set of this process so far, in 10^9 bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit_bytes = 1 if sys.platform == "darwin" else 1024  # getrusage(2): kilobytes on Linux, bytes on macOS
    return peak * unit_bytes / 1e9

"""The figures that people quote of a step: what each divides by what is said in metrics.py, at ``perf/*``.

This file does NOT measure: seconds come from timer.py, data sheets and operations from costs/.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from aer_megatron.costs.hardware import Gpu
from aer_megatron.costs.model_size import ModelSizes
from aer_megatron.costs.step import forward_flops
from aer_megatron.report.metrics import Metric
from aer_megatron.types import Experience


@dataclass(frozen=True, slots=True)
class RunThroughput:
    """The ``perf/*`` of a run's steps; see loop/parts.Throughput. Without a CUDA device the last three stay None."""

    model: ModelSizes
    num_ranks: int
    generates_beside: bool  # rollouts go on while a batch is trained
    gpu: Gpu | None = None  # None also where no data sheet of it is known
    planned_bytes: float | None = None  # of the fullest rank
    peak_bytes: Callable[[], int] | None = None  # largest of all ranks, which call it together

    def __call__(self, times: Mapping[str, float], experience: Experience, *, num_generated: int) -> dict[str, float]:
        """Returns the metrics of one step from its ``time/*``, seconds; what cannot be divided is left out."""
        step_s = times[Metric.TIME_STEP]
        busy_s = times.get(Metric.TIME_SCORE, 0.0) + times.get(Metric.TIME_TRAIN, 0.0)
        generation_s = step_s if self.generates_beside else times.get(Metric.TIME_ROLLOUT, 0.0)
        num_tokens = len(experience.token_ids_L)
        metrics: dict[str, float] = {}
        if step_s > 0:
            metrics[Metric.PERF_TOKENS_PER_S_PER_GPU] = num_tokens / step_s / self.num_ranks
            metrics[Metric.PERF_IDLE_SHARE] = 1.0 - busy_s / step_s
        if generation_s > 0:
            metrics[Metric.PERF_ROLLOUT_TOKENS_PER_S] = num_generated / generation_s
        if self.gpu and times.get(Metric.TIME_TRAIN):
            attainable = self.gpu.bf16_flops * self.num_ranks * times[Metric.TIME_TRAIN]
            metrics[Metric.PERF_MFU] = self._update_flops(experience) / attainable
        if self.peak_bytes:
            peak = self.peak_bytes()
            metrics[Metric.PERF_PEAK_MEMORY_GB] = peak / 1e9
            if self.planned_bytes:
                metrics[Metric.PERF_PEAK_MEMORY_OF_PLAN] = peak / self.planned_bytes
        return metrics

    def _update_flops(self, experience: Experience) -> float:
        length_B = experience.length_B.astype(np.float64)
        return 3 * sum(
            forward_flops(
                self.model,
                tokens=float(length_B.sum()),
                squared_lengths=float((length_B**2).sum()),
                scored_tokens=experience.num_sampled_tokens,
                attention="flash",
            )
        )

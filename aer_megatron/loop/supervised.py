"""The supervised loop: makes the base policy that reinforcement learning starts from.

Flat like synchronous.py: batch -> update -> report. It takes minutes and its result is a Hugging Face
folder, so it is saved only where it is asked to stop; batches are a function of (seed, step).

This file does NOT know torch, ranks or files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from aer_megatron.report.metrics import Metric
from aer_megatron.report.reporter import StepReporter
from aer_megatron.report.timer import PhaseTimer
from aer_megatron.types import StepStats, SupervisedBatch


class SupervisedPolicy(Protocol):
    def train_supervised(self, batch: SupervisedBatch) -> StepStats: ...


def run_supervised(
    policy: SupervisedPolicy,
    batch_of_step: Callable[[int], SupervisedBatch],
    *,
    steps: range,
    reporter: StepReporter,
    timer: PhaseTimer,
    stop_requested: Callable[[], bool],
) -> int:
    """Returns the next step once the updates of ``steps`` are done, or ``stop_requested`` behind one of them."""
    for step in steps:
        batch = batch_of_step(step)
        with timer.phase("train"):
            stats = policy.train_supervised(batch)
        reporter.step(
            {
                Metric.STEP: step,
                Metric.LOSS_SUPERVISED: stats.mean("supervised_loss"),
                Metric.TRAIN_GRAD_NORM: stats.grad_norm,
                Metric.TRAIN_LR: stats.learning_rate,
            }
            | timer.take(num_tokens=len(batch.token_ids_L))
        )
        if step + 1 < steps.stop and stop_requested():
            return step + 1
    return steps.stop

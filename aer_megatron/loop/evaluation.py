"""The evaluation of the policy that the engine serves, on the sets that are due.

Nothing here touches what training draws from: a set has a stream of random numbers and problems of its own, so a run
trains on the same numbers with and without evaluation.

This file does NOT decide when an evaluation is waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from aer_megatron.loop.parts import Begin, EvaluationSet, Parts
from aer_megatron.report.evaluation import evaluation_metrics
from aer_megatron.types import RolloutGroup

Finish = Callable[[], dict[str, float]]


def due_sets(sets: Sequence[EvaluationSet], step: int, *, num_steps: int) -> list[EvaluationSet]:
    """Returns the sets that are evaluated before ``step``; before step ``num_steps``, which never comes, all."""
    return [each for each in sets if each.options.every and (step == num_steps or step % each.options.every == 0)]


def begin_evaluation(parts: Parts, sets: Sequence[EvaluationSet], step: int, begin: Begin) -> Finish:
    """Returns what gives the metrics of ``sets``, after ``begin`` had their answers sampled or began it.

    Every rank calls both, in the same order: ``Finish`` judges and exchanges.
    """
    if not sets:
        return dict
    with parts.timer.phase("eval"):
        wait = begin(lambda: [each.collector.collect(each.prompts, step=step, refill=0) for each in sets])
    return partial(_finish, parts, sets, step, wait)


def _finish(
    parts: Parts, sets: Sequence[EvaluationSet], step: int, wait: Callable[[], list[list[RolloutGroup]]]
) -> dict[str, float]:
    metrics: dict[str, float] = {}
    with parts.timer.phase("eval"):
        for each, groups in zip(sets, wait(), strict=True):
            scored = parts.rollouts.score_groups(groups)
            parts.samples.evaluated(step, each.name, scored)
            experience, _ = parts.rollouts.gather(scored)
            majority_P = each.votes(scored, [k for k in each.options.k if k > 1]) if each.votes else {}
            metrics |= evaluation_metrics(each.name, each.options, experience, majority_P)
    return metrics

"""The metrics of one evaluation of one set.

This file does NOT spell metric names (metrics.py) or hold statistics (algo/passk.py).
"""

from __future__ import annotations

from collections.abc import Mapping

from aer_megatron.algo.advantage import group_verdicts
from aer_megatron.algo.passk import pass_at_k, pass_interval
from aer_megatron.options.data import EvalSetSection
from aer_megatron.report.metrics import of_set, pass_at
from aer_megatron.types import Experience, Float64Array


def evaluation_metrics(
    name: str, options: EvalSetSection, experience: Experience, majority_P: Mapping[int, Float64Array]
) -> dict[str, float]:
    """Returns the metrics of evaluation set ``name``.

    Args:
        experience: its samples, of all ranks.
        majority_P: by k, maj@k of every problem.
    """
    verdicts = group_verdicts(experience)
    counts_P, successes_P = verdicts.counts_P, verdicts.successes_P
    metrics: dict[str, float] = {}
    for k in options.k:
        metrics[pass_at(name, k)] = float(pass_at_k(counts_P, successes_P, k=k).mean())
        interval = pass_interval(counts_P, successes_P, k=k)
        metrics |= {
            of_set(name, f"pass@K_{end}", k): value for end, value in zip(("low", "high"), interval, strict=True)
        }
    metrics |= {of_set(name, "maj@K", k): float(values_P.mean()) for k, values_P in majority_P.items()}
    return metrics | {
        of_set(name, "avg@K", options.num_samples): float(experience.reward_B.mean()),
        of_set(name, "response_length_mean"): float(experience.response_length_B.mean()),
        of_set(name, "truncated"): float(experience.truncated_B.mean()),
    }

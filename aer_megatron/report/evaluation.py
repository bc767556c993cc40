"""The metrics of one evaluation of one set.

This file does NOT spell metric names (metrics.py) or hold statistics (algo/passk.py).
"""

from __future__ import annotations

from aer_megatron.algo.advantage import group_verdicts
from aer_megatron.algo.passk import pass_at_k
from aer_megatron.options.data import EvalSetSection
from aer_megatron.report.metrics import of_set, pass_at
from aer_megatron.types import Experience


def evaluation_metrics(name: str, options: EvalSetSection, experience: Experience) -> dict[str, float]:
    """Returns the metrics of evaluation set ``name``, whose samples of all ranks are ``experience``."""
    verdicts = group_verdicts(experience)
    counts_P, successes_P = verdicts.counts_P, verdicts.successes_P
    return {pass_at(name, k): float(pass_at_k(counts_P, successes_P, k=k).mean()) for k in options.k} | {
        of_set(name, "avg@K", options.num_samples): float(experience.reward_B.mean()),
        of_set(name, "response_length_mean"): float(experience.response_length_B.mean()),
        of_set(name, "truncated"): float(experience.truncated_B.mean()),
    }

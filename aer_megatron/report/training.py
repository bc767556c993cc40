"""The metrics of a policy update, from the sums that the loss reported.

This file does NOT spell metric names (metrics.py) or reduce over ranks.
"""

from __future__ import annotations

from aer_megatron.report.metrics import Metric
from aer_megatron.types import StepStats


def training_metrics(stats: StepStats, *, kl_coefficient: float) -> dict[str, float]:
    """Returns loss, clip and importance metrics of one step; a rule that is off has no entry."""
    policy_loss, bonus = stats.mean("policy_loss"), stats.mean("entropy_bonus")
    metrics: dict[str, float] = {
        Metric.LOSS_TOTAL: policy_loss - bonus,
        Metric.LOSS_POLICY: policy_loss,
        Metric.LOSS_ENTROPY_BONUS: bonus,
        Metric.TRAIN_GRAD_NORM: stats.grad_norm,
        Metric.TRAIN_LR: stats.learning_rate,
        Metric.TRAIN_CLIP_LOW: stats.mean("clip_low"),
        Metric.TRAIN_CLIP_HIGH: stats.mean("clip_high"),
        Metric.TRAIN_APPROX_KL: stats.mean("approx_kl"),
    }
    if "reference_kl" in stats.sums:
        metrics[Metric.LOSS_KL] = stats.mean("reference_kl")
        metrics[Metric.LOSS_TOTAL] += kl_coefficient * stats.mean("reference_kl")
    if "selected" in stats.sums:
        metrics[Metric.TRAIN_COV_SELECTED] = stats.mean("selected")
    if "tis_weight" in stats.sums:
        metrics[Metric.TRAIN_TIS_CUT] = stats.mean("tis_cut")
        # (sum w)^2 / (n sum w^2): 1 for equal weights, 1/n where one token has all of it
        metrics[Metric.TRAIN_TIS_SAMPLE_SIZE] = stats.mean("tis_weight") ** 2 / stats.mean("tis_weight_squared")
    return metrics

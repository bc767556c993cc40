"""Metrics of a policy update from its sums; what a rule that is off leaves out."""

from __future__ import annotations

import pytest

from aer_megatron.report.training import training_metrics
from aer_megatron.types import StepStats

PLAIN = {
    "policy_loss": (-2.0, 10.0),
    "entropy_bonus": (0.5, 10.0),
    "clip_low": (1.0, 10.0),
    "clip_high": (2.0, 10.0),
    "approx_kl": (0.3, 10.0),
}


def test_a_plain_step() -> None:
    metrics = training_metrics(StepStats(PLAIN, grad_norm=1.5, learning_rate=1e-3), kl_coefficient=0.0)
    assert metrics == pytest.approx(
        {
            "loss/total": -0.25,
            "loss/policy": -0.2,
            "loss/entropy_bonus": 0.05,
            "train/grad_norm": 1.5,
            "train/lr": 1e-3,
            "train/clip_low": 0.1,
            "train/clip_high": 0.2,
            "train/approx_kl": 0.03,
        }
    )


def test_every_rule_in_force_adds_its_metrics() -> None:
    # weights 2 on one token and 0.5 on nine: sum 6.5, squares 4 + 2.25 = 6.25; 6.5^2 / (10 * 6.25) = 0.676
    sums = PLAIN | {
        "reference_kl": (1.0, 10.0),
        "selected": (3.0, 10.0),
        "importance_weight": (6.5, 10.0),
        "importance_weight_squared": (6.25, 10.0),
        "importance_cut": (1.0, 10.0),
        "importance_rejected": (2.0, 10.0),
    }
    metrics = training_metrics(StepStats(sums, grad_norm=1.5, learning_rate=1e-3), kl_coefficient=0.5)
    assert metrics["loss/kl"] == pytest.approx(0.1)
    assert metrics["loss/total"] == pytest.approx(-0.25 + 0.5 * 0.1)
    assert metrics["train/cov_selected"] == pytest.approx(0.3)
    assert metrics["train/importance_cut"] == pytest.approx(0.1)
    assert metrics["train/importance_rejected"] == pytest.approx(0.2)
    assert metrics["train/importance_sample_size"] == pytest.approx(0.676)

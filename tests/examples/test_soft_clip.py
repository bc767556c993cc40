"""The soft clip of examples/extend against numbers derived by hand; its layouts are in tests/distributed."""

from __future__ import annotations

import math

import pytest
import torch

from aer_megatron.algo.loss import policy_loss
from aer_megatron.config_loading import load_config
from tests.support.tokens import token_data

OPTIONS = [
    "--model.path=base",
    "--data.train.task=countdown",
    "--algo.policy_loss.kind=examples.extend.soft_clip:SoftClip",
]


def test_the_soft_clip_is_its_formula() -> None:
    config = load_config(None, [*OPTIONS, "--algo.policy_loss.tau_positive=2", "--algo.policy_loss.tau_negative=4"])
    ratio = torch.tensor([1.0, 1.0, 2.0, 0.5], dtype=torch.float64)
    advantage = torch.tensor([1.0, -2.0, 1.0, -1.0], dtype=torch.float64)
    old = torch.full((4,), -1.0, dtype=torch.float64)
    logprob = (old + ratio.log()).requires_grad_()
    tokens = token_data(old, advantage)
    output = policy_loss(logprob, torch.zeros_like(old), tokens=tokens, normalizer=10.0, config=config.algo)
    # f = 4 sigmoid(tau (r - 1)) / tau: 1, 1/2, 2 s(2), s(-2) = 1 - s(2); -f A adds to -1 + 1 - 2 s + 1 - s
    gate = 1 / (1 + math.exp(-2))
    assert output.loss.item() == pytest.approx((1 - 3 * gate) / 10, rel=1e-12)
    output.loss.backward()  # type: ignore[no-untyped-call]
    # -A r f'(r), f' = 4 s (1 - s): 1 where r = 1, so -1 and 2 there
    weight = 4 * gate * (1 - gate)
    assert logprob.grad is not None
    assert logprob.grad.tolist() == pytest.approx([-0.1, 0.2, -2 * weight / 10, 0.5 * weight / 10], rel=1e-12)
    total, count = output.sums["gate"]
    assert (float(total), count) == (pytest.approx(2 + 2 * weight, rel=1e-12), 4.0)


def test_its_options_are_checked() -> None:
    with pytest.raises(ValueError, match=r"option algo\.policy_loss\.tau_negative=0 is not valid"):
        load_config(None, [*OPTIONS, "--algo.policy_loss.tau_negative=0"])

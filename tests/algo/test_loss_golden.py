"""The losses against numbers derived by hand."""

from __future__ import annotations

import math

import pytest
import torch

from aer_megatron.algo.loss import policy_loss, supervised_loss
from aer_megatron.algo.options import AlgoSection
from aer_megatron.algo.policy_losses.clip import Clip
from tests.support.tokens import token_data

CONFIG = AlgoSection(policy_loss=Clip(clip_low=0.2, clip_high=0.28))
# Ratios r and advantages A of six tokens, with what min(r A, clip(r) A) is and whether its gradient survives:
#   r    A   surrogate                                     d surrogate / d logprob = r A where not clipped
#   1.0  +1  min(1.0, 1.0)            =  1.0               1.0
#   1.5  +1  min(1.5, 1.28)           =  1.28  clip_high   0
#   0.5  +1  min(0.5, 0.8)            =  0.5               0.5
#   0.5  -1  min(-0.5, -0.8)          = -0.8   clip_low    0
#   1.5  -1  min(-1.5, -1.28)         = -1.5               -1.5
#   4.0  -2  min(-8.0, -2.56)         = -8.0               -8.0
RATIOS = [1.0, 1.5, 0.5, 0.5, 1.5, 4.0]
ADVANTAGES = [1.0, 1.0, 1.0, -1.0, -1.0, -2.0]
SURROGATES = [1.0, 1.28, 0.5, -0.8, -1.5, -8.0]
GRADIENTS = [1.0, 0.0, 0.5, 0.0, -1.5, -8.0]
ENTROPIES = [0.5, 0.25, 1.0, 0.0, 2.0, 0.125]
WEIGHTS = [0.1, 0.0, 0.2, 0.3, 0.05, 0.4]
# w H: 0.05 + 0 + 0.2 + 0 + 0.1 + 0.05 = 0.4
NORMALIZER = 10.0


def inputs():
    old = torch.tensor([-1.0, -0.5, -2.0, -0.1, -3.0, -0.7], dtype=torch.float64)
    logprob = (old + torch.tensor(RATIOS, dtype=torch.float64).log()).requires_grad_()
    entropy = torch.tensor(ENTROPIES, dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor(ADVANTAGES, dtype=torch.float64)
    weight = torch.tensor(WEIGHTS, dtype=torch.float64)
    return logprob, entropy, token_data(old, advantage, entropy_weight_T=weight)


def test_policy_loss_and_gradients():
    logprob, entropy, tokens = inputs()
    output = policy_loss(logprob, entropy, tokens=tokens, normalizer=NORMALIZER, config=CONFIG)
    # surrogates: 1 + 1.28 + 0.5 - 0.8 - 1.5 - 8 = -7.52; loss = -(-7.52 + 0.4) / 10 = 0.712
    assert output.loss.item() == pytest.approx(0.712, rel=1e-12)
    output.loss.backward()
    expected = torch.tensor(GRADIENTS, dtype=torch.float64) / -NORMALIZER
    torch.testing.assert_close(logprob.grad, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(entropy.grad, -tokens.entropy_weight_T / NORMALIZER, rtol=1e-12, atol=0)


def test_dual_clip_bounds_only_negative_advantages():
    logprob, entropy, tokens = inputs()
    output = policy_loss(
        logprob,
        entropy,
        tokens=tokens,
        normalizer=NORMALIZER,
        config=AlgoSection(policy_loss=Clip(clip_low=0.2, clip_high=0.28, dual_clip=3.0)),
    )
    # Only the last token has r = 4 > 3 with A < 0: -8 becomes 3 * -2 = -6, its gradient 0. Loss 0.512.
    assert output.loss.item() == pytest.approx(0.512, rel=1e-12)
    output.loss.backward()
    expected = torch.tensor([*GRADIENTS[:5], 0.0], dtype=torch.float64) / -NORMALIZER
    torch.testing.assert_close(logprob.grad, expected, rtol=1e-12, atol=0)
    assert output.sums["dual_clip"][0].item() == 1


def test_sums_are_detached_float64_sums_with_token_counts():
    logprob, entropy, tokens = inputs()
    sums = policy_loss(logprob, entropy, tokens=tokens, normalizer=NORMALIZER, config=CONFIG).sums
    expected = {
        "policy_loss": -sum(SURROGATES),
        "entropy_bonus": 0.4,
        "token_entropy": 3.875,
        "ratio": 9.0,
        "clip_low": 1,
        "clip_high": 1,
        "dual_clip": 0,
        "approx_kl": sum(r - 1 - math.log(r) for r in RATIOS),
    }
    assert sums.keys() == expected.keys()
    for name, value in expected.items():
        total, count = sums[name]
        assert total.item() == pytest.approx(value, rel=1e-12), name
        assert count == 6
        assert total.dtype == torch.float64 and not total.requires_grad


def test_at_the_old_policy_the_gradient_is_minus_advantage():
    # r = 1 exactly, both branches of the minimum equal: the gradient must be A, not A/2 and not 2A.
    logprob = torch.tensor([-1.0, -2.0], requires_grad=True)
    zeros = torch.zeros(2)
    output = policy_loss(
        logprob,
        zeros,
        tokens=token_data(logprob.detach(), torch.tensor([0.75, -1.5])),
        normalizer=4.0,
        config=CONFIG,
    )
    output.loss.backward()
    assert logprob.grad.tolist() == [-0.75 / 4, 1.5 / 4]
    assert output.sums["approx_kl"][0].item() == 0


def test_no_tokens_give_a_zero_with_a_graph():
    parameter = torch.ones(3, requires_grad=True)
    empty = parameter[:0]
    data = torch.zeros(0)
    output = policy_loss(
        empty,
        empty,
        tokens=token_data(data, data),
        normalizer=5.0,
        config=AlgoSection(policy_loss=Clip(dual_clip=3.0)),
    )
    assert output.loss.item() == 0
    output.loss.backward()
    assert parameter.grad.tolist() == [0, 0, 0]
    assert all(total.item() == 0 and count == 0 for total, count in output.sums.values())
    parameter.grad = None
    supervised_loss(parameter[:0], normalizer=5.0).loss.backward()
    assert parameter.grad.tolist() == [0, 0, 0]


def test_a_huge_log_ratio_overflows_nothing():
    logprob = torch.tensor([0.0, 0.0, 0.0], requires_grad=True)
    output = policy_loss(
        logprob,
        torch.zeros(3),
        tokens=token_data(torch.full((3,), -200.0), torch.tensor([0.0, 1.0, -1.0])),
        normalizer=3.0,
        config=CONFIG,
    )
    output.loss.backward()
    assert torch.isfinite(output.loss) and torch.isfinite(logprob.grad).all()
    # surrogates: 0, 1.28 and -exp(20)
    assert output.loss.item() == pytest.approx((math.exp(20) - 1.28) / 3, rel=1e-6)


def test_supervised_loss():
    # -( -0.5 - 1.5 - 2 ) / 8 = 0.5, gradient -1/8 each
    logprob = torch.tensor([-0.5, -1.5, -2.0], requires_grad=True)
    output = supervised_loss(logprob, normalizer=8.0)
    assert output.loss.item() == 0.5
    output.loss.backward()
    assert logprob.grad.tolist() == [-0.125] * 3
    total, count = output.sums["supervised_loss"]
    assert (total.item(), count, total.dtype) == (4.0, 3.0, torch.float64)


@pytest.mark.parametrize("normalizer", [0.0, -1.0, math.nan])
def test_a_normalizer_that_is_not_positive_is_refused(normalizer):
    with pytest.raises(ValueError, match="normalizer="):
        supervised_loss(torch.zeros(2), normalizer=normalizer)


def test_shapes_that_differ_are_refused():
    good, bad = torch.zeros(2), torch.zeros(2, 1)
    with pytest.raises(ValueError, match="one shape"):
        policy_loss(good, good, tokens=token_data(good, bad), normalizer=2.0, config=CONFIG)

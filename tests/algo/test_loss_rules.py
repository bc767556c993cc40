"""The other rules of the policy loss against numbers derived by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from aer_megatron.algo.kl_estimators.k2 import K2
from aer_megatron.algo.loss import policy_loss, sequence_weights
from aer_megatron.algo.options import AlgoSection
from aer_megatron.algo.policy_losses.clip import Clip
from aer_megatron.algo.policy_losses.clip_cov import ClipCov
from aer_megatron.algo.policy_losses.kl_cov import KlCov
from tests.support.tokens import token_data

LN2 = math.log(2)
# The six tokens of test_loss.py: ratios, advantages and clipped surrogates (bounds 0.8 and 1.28).
RATIOS = [1.0, 1.5, 0.5, 0.5, 1.5, 4.0]
ADVANTAGES = [1.0, 1.0, 1.0, -1.0, -1.0, -2.0]
NORMALIZER = 10.0


def double(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def run(config: AlgoSection, **given):
    old = double([-1.0, -0.5, -2.0, -0.1, -3.0, -0.7])
    logprob = (old + double(RATIOS).log()).requires_grad_()
    tokens = token_data(old, double(ADVANTAGES), **given)
    output = policy_loss(logprob, torch.zeros_like(old), tokens=tokens, normalizer=NORMALIZER, config=config)
    output.loss.backward()
    return output, (logprob.grad * NORMALIZER).tolist()


def test_clip_cov_silences_the_selected_tokens():
    selected = torch.tensor([True, False, False, False, True, False])
    output, gradient = run(AlgoSection(policy_loss=ClipCov(clip_high=0.28)), selected_T=selected)
    # surrogates 1, 1.28, 0.5, -0.8, -1.5, -8 without the first and the fifth: -7.02
    assert output.loss.item() == pytest.approx(0.702, rel=1e-12)
    assert gradient == pytest.approx([0, 0, -0.5, 0, 0, 8.0], rel=1e-12)
    assert output.sums["policy_loss"][0].item() == pytest.approx(7.02, rel=1e-12)
    assert output.sums["selected"][0].item() == 2
    assert output.sums["clip_low"][0].item() == output.sums["clip_high"][0].item() == 1


def test_kl_cov_holds_the_selected_tokens_and_clips_nothing():
    selected = torch.tensor([False, False, True, False, False, True])
    config = AlgoSection(policy_loss=KlCov(coefficient=0.5))
    output, gradient = run(config, selected_T=selected)
    # -r A: -1, -1.5, -0.5, 0.5, 1.5, 8 = 7; penalties 0.5 |ln 0.5| = 0.5 ln 2 and 0.5 ln 4 = ln 2
    assert output.loss.item() == pytest.approx((7 + 1.5 * LN2) / NORMALIZER, rel=1e-12)
    # -r A, and 0.5 sign(log r) for the selected: -0.5 - 0.5 and 8 + 0.5
    assert gradient == pytest.approx([-1, -1.5, -1, 0.5, 1.5, 8.5], rel=1e-12)
    assert output.sums["clip_low"][0].item() == output.sums["clip_high"][0].item() == 0


def test_kl_cov_ignores_the_sign_of_rounding():
    logprob = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    old = torch.tensor([-1.0 - 1e-6, -1.0 + 1e-6, -1.001])
    zeros, every = torch.zeros(3), torch.ones(3, dtype=torch.bool)
    policy_loss(
        logprob,
        zeros,
        tokens=token_data(old, zeros, selected_T=every),
        normalizer=1.0,
        config=AlgoSection(policy_loss=KlCov()),
    ).loss.backward()
    assert logprob.grad.tolist() == [0, 0, 1]


def test_truncated_importance_weights():
    weight = double([1.0, 2.0, 0.5, 1.6, 1.0, 1.0])
    output, gradient = run(AlgoSection(policy_loss=Clip(clip_high=0.28)), importance_T=weight)
    # -surrogates times weights: -1, -1.28 * 2, -0.5 * 0.5, 0.8 * 1.6, 1.5, 8 = 6.97
    assert output.loss.item() == pytest.approx(0.697, rel=1e-12)
    assert gradient == pytest.approx([-1, 0, -0.25, 0, 1.5, 8], rel=1e-12)
    assert output.sums["importance_rejected"][0].item() == 0
    assert output.sums["importance_cut"][0].item() == 1
    assert output.sums["importance_weight"][0].item() == pytest.approx(7.1, rel=1e-12)
    assert output.sums["importance_weight_squared"][0].item() == pytest.approx(9.81, rel=1e-12)


def test_k3_to_a_reference_policy():
    logprob = double([-1.0, -2.0, -3.0]).requires_grad_()
    reference = logprob.detach() + double([0.0, LN2, -LN2])
    zeros = torch.zeros(3, dtype=torch.float64)
    output = policy_loss(
        logprob,
        zeros,
        tokens=token_data(logprob.detach(), zeros, ref_logprob_T=reference, mean_weight_T=double([1, 1, 2])),
        normalizer=5.0,
        config=AlgoSection(kl_coefficient=0.3),
    )
    # e^x - x - 1: 0, 2 - ln 2 - 1, 1/2 + ln 2 - 1; the last has weight 2: 1 - ln 2 + 2 ln 2 - 1 = ln 2
    assert output.sums["reference_kl"][0].item() == pytest.approx(LN2, rel=1e-12)
    assert output.loss.item() == pytest.approx(0.3 * LN2 / 5, rel=1e-12)
    output.loss.backward()
    # 1 - e^x: 0, -1, 1/2 (times 2)
    assert logprob.grad.tolist() == pytest.approx([0, -0.3 / 5, 0.3 / 5], rel=1e-12)


def test_a_weight_in_the_mean_multiplies_policy_loss_and_bonus():
    weight = double([2.0, 1.0, 0.5, 1.0, 0.0, 0.25])
    entropy_weight = double([0.1, 0.0, 0.0, 0.0, 0.5, 0.4])
    old = double([-1.0] * 6)
    logprob = old.clone().requires_grad_()
    entropy = double([1.0, 1.0, 1.0, 1.0, 1.0, 0.5]).requires_grad_()
    tokens = token_data(old, double(ADVANTAGES), mean_weight_T=weight, entropy_weight_T=entropy_weight)
    output = policy_loss(logprob, entropy, tokens=tokens, normalizer=NORMALIZER, config=AlgoSection())
    # r = 1: w A = 2, 1, 0.5, -1, 0, -0.5 = 2; w e H = 0.2 + 0 + 0.25 * 0.2 = 0.25
    assert output.loss.item() == pytest.approx(-0.225, rel=1e-12)
    assert output.sums["policy_loss"][0].item() == pytest.approx(-2, rel=1e-12)
    assert output.sums["entropy_bonus"][0].item() == pytest.approx(0.25, rel=1e-12)
    assert output.sums["token_entropy"][0].item() == 5.5
    output.loss.backward()
    assert logprob.grad.tolist() == pytest.approx([-0.2, -0.1, -0.05, 0.1, 0, 0.05], rel=1e-12)
    assert entropy.grad.tolist() == pytest.approx([-0.02, 0, 0, 0, 0, -0.01], rel=1e-12)


def test_sequence_weights():
    # lengths 2 and 4, N = 6: 6 / (2 * 2) and 6 / (2 * 4); with max_new_tokens 5: 6 / (2 * 5)
    lengths = np.array([2, 4])
    assert sequence_weights(lengths, rule="tokens", max_new_tokens=5).tolist() == [1, 1]
    assert sequence_weights(lengths, rule="sequences", max_new_tokens=5).tolist() == [1.5, 0.75]
    assert sequence_weights(lengths, rule="constant", max_new_tokens=5).tolist() == [0.6, 0.6]


@pytest.mark.parametrize(
    ("config", "given", "words"),
    [
        (AlgoSection(policy_loss=KlCov()), {}, "algo.policy_loss.kind='kl_cov'"),
        (AlgoSection(), {"selected_T": torch.ones(6, dtype=torch.bool)}, "algo.policy_loss.kind='clip'"),
        (AlgoSection(kl_coefficient=0.1), {}, "algo.kl_coefficient=0.1"),
    ],
)
def test_data_that_a_rule_lacks_is_an_error(config, given, words):
    with pytest.raises(ValueError, match=words):
        run(config, **given)


def test_k2_to_a_reference_policy():
    logprob = double([-1.0, -2.0, -3.0]).requires_grad_()
    zeros = torch.zeros(3, dtype=torch.float64)
    output = policy_loss(
        logprob,
        zeros,
        tokens=token_data(logprob.detach(), zeros, ref_logprob_T=logprob.detach() + double([0.0, 2.0, -4.0])),
        normalizer=5.0,
        config=AlgoSection(kl_coefficient=0.5, kl_estimator=K2()),
    )
    # x^2 / 2: 0, 2, 8
    assert output.sums["reference_kl"][0].item() == 10
    assert output.loss.item() == pytest.approx(1.0, rel=1e-12)
    output.loss.backward()
    # -x: 0, -2, 4
    assert logprob.grad.tolist() == pytest.approx([0, -0.2, 0.4], rel=1e-12)

"""The losses against numbers derived by hand, and the laws of the policy loss."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aer_megatron.algo.kl_estimators.k2 import K2
from aer_megatron.algo.kl_estimators.k3 import K3
from aer_megatron.algo.loss import TokenData, policy_loss, sequence_weights, supervised_loss
from aer_megatron.algo.options import AlgoSection
from aer_megatron.algo.policy_losses.clip import Clip, ClippedRatio
from aer_megatron.algo.policy_losses.clip_cov import ClipCov
from aer_megatron.algo.policy_losses.kl_cov import KlCov
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


# Laws: the loss adds up over any split, and its gradient is the derivative of its value

seeds = st.integers(0, 2**31)
bounds = {
    "clip_low": st.floats(0.05, 0.5),
    "clip_high": st.floats(0.05, 0.5),
    "dual_clip": st.sampled_from([0.0, 1.5, 3.0]),
}
options = st.builds(
    AlgoSection,
    policy_loss=st.one_of(
        st.builds(Clip, **bounds), st.builds(ClipCov, **bounds), st.builds(KlCov, coefficient=st.floats(0.1, 2.0))
    ),
    kl_coefficient=st.sampled_from([0.0, 0.3]),
    kl_estimator=st.sampled_from([K3(), K2()]),
)


def batch(
    seed: int, num_tokens: int, dtype: torch.dtype, config: AlgoSection
) -> tuple[torch.Tensor, torch.Tensor, TokenData]:
    generator = torch.Generator().manual_seed(seed)

    def normal() -> torch.Tensor:
        return torch.randn(num_tokens, generator=generator, dtype=dtype)

    logprob = (-normal().abs()).requires_grad_()
    entropy = normal().abs().requires_grad_()
    old = logprob.detach() + 0.6 * normal()
    tokens = token_data(
        old,
        normal(),
        entropy_weight_T=0.1 * normal().abs(),
        mean_weight_T=normal().abs(),
        importance_T=(0.3 * normal()).exp() if seed % 2 else None,
        selected_T=normal() > 0.5 if config.policy_loss.selects else None,
        ref_logprob_T=logprob.detach() + 0.5 * normal() if config.kl_coefficient else None,
    )
    return logprob, entropy, tokens


def part_of(tokens: TokenData, start: int, end: int) -> TokenData:
    values = {field.name: getattr(tokens, field.name) for field in dataclasses.fields(tokens)}
    return TokenData(**{name: None if value is None else value[start:end] for name, value in values.items()})


@settings(deadline=None)
@given(seeds, st.integers(1, 40), st.lists(st.integers(0, 40), max_size=5), options)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_loss_and_gradient_do_not_depend_on_the_split(dtype, tolerance, seed, num_tokens, cuts, chosen):
    normalizer = float(num_tokens)
    logprob, entropy, tokens = batch(seed, num_tokens, dtype, chosen)
    whole = policy_loss(logprob, entropy, tokens=tokens, normalizer=normalizer, config=chosen)
    whole.loss.backward()
    gradients = (logprob.grad.clone(), entropy.grad.clone())
    logprob.grad = entropy.grad = None

    bounds = [0, *sorted(min(cut, num_tokens) for cut in cuts), num_tokens]  # parts without tokens included
    total = torch.zeros((), dtype=dtype)
    sums = dict.fromkeys(whole.sums, 0.0)
    counts = dict.fromkeys(whole.sums, 0.0)
    for start, end in pairwise(bounds):
        part = part_of(tokens, start, end)
        output = policy_loss(logprob[start:end], entropy[start:end], tokens=part, normalizer=normalizer, config=chosen)
        output.loss.backward()
        total += output.loss.detach()
        for name, (value, count) in output.sums.items():
            sums[name] += value.item()
            counts[name] += count
    torch.testing.assert_close(total, whole.loss.detach(), rtol=tolerance, atol=tolerance)
    # A token's gradient sees no other token: bitwise equal.
    assert torch.equal(logprob.grad, gradients[0])
    assert torch.equal(entropy.grad, gradients[1])
    for name, (value, count) in whole.sums.items():
        assert sums[name] == pytest.approx(value.item(), rel=1e-9, abs=1e-9), name
        assert counts[name] == count == num_tokens


@settings(deadline=None)
@given(seeds, st.integers(1, 12), options)
def test_gradient_is_the_finite_difference(seed, num_tokens, chosen):
    logprob, entropy, tokens = batch(seed, num_tokens, torch.float64, chosen)
    policy_loss(logprob, entropy, tokens=tokens, normalizer=7.0, config=chosen).loss.backward()
    ratio = (logprob.detach() - tokens.old_logprob_T).exp()
    rule, edges = chosen.policy_loss, [1.0]
    if isinstance(rule, ClippedRatio):
        edges += [1 - rule.clip_low, 1 + rule.clip_high, rule.dual_clip or 1e9]
    step = 1e-6
    for index in range(num_tokens):
        if any(abs(ratio[index].item() - edge) < 1e-4 for edge in edges):
            continue  # a kink: no derivative there
        for tensor in (logprob, entropy):
            values = []
            for sign in (1, -1):
                moved = [logprob.detach().clone(), entropy.detach().clone()]
                moved[0 if tensor is logprob else 1][index] += sign * step
                values.append(policy_loss(*moved, tokens=tokens, normalizer=7.0, config=chosen).loss.item())
            slope = (values[0] - values[1]) / (2 * step)
            assert tensor.grad[index].item() == pytest.approx(slope, rel=1e-5, abs=1e-8)


@settings(deadline=None)
@given(seeds, st.integers(1, 30), options)
def test_bounds_of_the_statistics(seed, num_tokens, chosen):
    logprob, entropy, tokens = batch(seed, num_tokens, torch.float32, chosen)
    sums = policy_loss(logprob, entropy, tokens=tokens, normalizer=1.0, config=chosen).sums
    assert sums["approx_kl"][0].item() >= 0
    clipped = sums["clip_low"][0].item() + sums["clip_high"][0].item() + sums["dual_clip"][0].item()
    assert clipped <= num_tokens  # the three exclude one another
    assert ("reference_kl" in sums) == (chosen.kl_coefficient > 0)
    assert ("importance_weight" in sums) == (tokens.importance_T is not None)
    if chosen.kl_coefficient:
        assert sums["reference_kl"][0].item() >= 0
    if tokens.importance_T is not None:
        weight, squared = sums["importance_weight"][0].item(), sums["importance_weight_squared"][0].item()
        assert weight**2 <= num_tokens * squared * (1 + 1e-6)  # the effective sample size is at most the sample


lengths = st.lists(st.integers(1, 50), min_size=1, max_size=20).map(lambda values: np.array(values, dtype=np.int64))


@given(lengths, st.integers(50, 100))
def test_sequence_weights_are_the_means_they_are_named_after(length_b, max_new_tokens):
    rng = np.random.default_rng(0)
    losses = [rng.normal(size=length) for length in length_b]
    expected = {
        "tokens": np.concatenate(losses).mean(),
        "sequences": np.mean([loss.mean() for loss in losses]),
        "constant": np.concatenate(losses).sum() / (len(losses) * max_new_tokens),
    }
    for rule, mean in expected.items():
        weight_b = sequence_weights(length_b, rule=rule, max_new_tokens=max_new_tokens)
        weighted = sum(weight * loss.sum() for weight, loss in zip(weight_b, losses, strict=True))
        assert weighted / length_b.sum() == pytest.approx(mean, rel=1e-9, abs=1e-12), rule

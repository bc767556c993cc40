"""Laws of the policy loss: it adds up over any split, and its gradient is the derivative of its value."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aer_megatron.algo.loss import PolicyLossOptions, policy_loss

seeds = st.integers(0, 2**31)
options = st.builds(
    PolicyLossOptions, st.floats(0.05, 0.5), st.floats(0.05, 0.5), st.sampled_from([0.0, 1.5, 3.0])
)


def batch(
    seed: int, num_tokens: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def normal() -> torch.Tensor:
        return torch.randn(num_tokens, generator=generator, dtype=dtype)

    logprob = (-normal().abs()).requires_grad_()
    entropy = normal().abs().requires_grad_()
    data = {
        "old_logprob_T": logprob.detach() + 0.6 * normal(),
        "advantage_T": normal(),
        "entropy_weight_T": 0.1 * normal().abs(),
    }
    return logprob, entropy, data


@settings(deadline=None)
@given(seeds, st.integers(1, 40), st.lists(st.integers(0, 40), max_size=5), options)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_loss_and_gradient_do_not_depend_on_the_split(dtype, tolerance, seed, num_tokens, cuts, chosen):
    normalizer = float(num_tokens)
    logprob, entropy, data = batch(seed, num_tokens, dtype)
    whole = policy_loss(logprob, entropy, **data, normalizer=normalizer, options=chosen)
    whole.loss.backward()
    gradients = (logprob.grad.clone(), entropy.grad.clone())
    logprob.grad = entropy.grad = None

    bounds = [0, *sorted(min(cut, num_tokens) for cut in cuts), num_tokens]  # parts without tokens included
    total = torch.zeros((), dtype=dtype)
    sums = dict.fromkeys(whole.sums, 0.0)
    counts = dict.fromkeys(whole.sums, 0.0)
    for start, end in pairwise(bounds):
        part = {name: value[start:end] for name, value in data.items()}
        output = policy_loss(
            logprob[start:end], entropy[start:end], **part, normalizer=normalizer, options=chosen
        )
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
    logprob, entropy, data = batch(seed, num_tokens, torch.float64)
    policy_loss(logprob, entropy, **data, normalizer=7.0, options=chosen).loss.backward()
    ratio = (logprob.detach() - data["old_logprob_T"]).exp()
    edges = [1 - chosen.clip_low, 1 + chosen.clip_high, chosen.dual_clip or 1e9]
    step = 1e-6
    for index in range(num_tokens):
        if any(abs(ratio[index].item() - edge) < 1e-4 for edge in edges):
            continue  # a kink: no derivative there
        for tensor in (logprob, entropy):
            values = []
            for sign in (1, -1):
                moved = [logprob.detach().clone(), entropy.detach().clone()]
                moved[0 if tensor is logprob else 1][index] += sign * step
                values.append(policy_loss(*moved, **data, normalizer=7.0, options=chosen).loss.item())
            slope = (values[0] - values[1]) / (2 * step)
            assert tensor.grad[index].item() == pytest.approx(slope, rel=1e-5, abs=1e-8)


@settings(deadline=None)
@given(seeds, st.integers(1, 30), options)
def test_bounds_of_the_statistics(seed, num_tokens, chosen):
    logprob, entropy, data = batch(seed, num_tokens, torch.float32)
    sums = policy_loss(logprob, entropy, **data, normalizer=1.0, options=chosen).sums
    assert sums["approx_kl"][0].item() >= 0
    clipped = sums["clip_low"][0].item() + sums["clip_high"][0].item() + sums["dual_clip"][0].item()
    assert clipped <= num_tokens  # the three exclude one another

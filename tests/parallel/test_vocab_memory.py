"""Peak memory of forward and backward, logits included, in units U of one float32 [N, V / TP] tensor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from aer_megatron.parallel.fused_head import fused_linear_logprob_entropy
from aer_megatron.parallel.vocab import vocab_parallel_logprob_entropy
from tests.support.storage_tracker import StorageTracker

TOKENS, COLUMNS = 1024, 8192
UNIT = 4 * TOKENS * COLUMNS


def _peak(form: Callable[[], tuple[Tensor, Tensor]], given: list[Tensor], exclude: list[Tensor]) -> float:
    weight_a, weight_b = torch.randn(2, TOKENS)
    with StorageTracker(*exclude) as tracker:
        tracker.track(*given)
        logprob, entropy = form()
        (logprob * weight_a + entropy * weight_b).sum().backward()
    return tracker.peak_bytes / UNIT


def _given_logits(dtype: torch.dtype) -> Tensor:
    leaf = torch.randn(TOKENS, COLUMNS).to(dtype).requires_grad_()
    return leaf.view_as(leaf)


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1.13), (torch.bfloat16, 0.90)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_given_logits(dtype: torch.dtype, bar: float, temperature: float) -> None:
    logits, labels = _given_logits(dtype), torch.randint(0, COLUMNS, (TOKENS,))

    def form() -> tuple[Tensor, Tensor]:
        result = vocab_parallel_logprob_entropy(logits, labels, temperature=temperature, with_statistics=True)
        return result.logprob_T, result.entropy_T

    assert logits.element_size() / 4 < _peak(form, [logits], []) <= bar


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("hidden_size", "megatron"), [(64, False), (64, True), (256, True)])
def test_fused_head(dtype: torch.dtype, hidden_size: int, megatron: bool) -> None:
    """All that comes on top of hidden states, weight and main_grad, which exist anyway; their gradients count."""
    labels = torch.randint(0, COLUMNS, (TOKENS,))
    hidden = torch.randn(TOKENS, hidden_size).to(dtype).requires_grad_()
    weight = torch.randn(COLUMNS, hidden_size).to(dtype).requires_grad_()
    exclude = [hidden, weight]
    if megatron:
        weight.main_grad = torch.zeros(COLUMNS, hidden_size)  # type: ignore[attr-defined]
        weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
        exclude.append(weight.main_grad)  # type: ignore[attr-defined]

    def form() -> tuple[Tensor, Tensor]:
        result = fused_linear_logprob_entropy(hidden, weight, labels, with_statistics=True)
        return result.logprob_T, result.entropy_T

    assert _peak(form, [], exclude) <= 0.35


def test_the_tracker_sees_what_the_plain_form_costs() -> None:
    """Logits, log-probabilities, probabilities, their product and gradients: at least four tensors at once."""
    logits, labels = _given_logits(torch.float32), torch.randint(0, COLUMNS, (TOKENS,))

    def plain() -> tuple[Tensor, Tensor]:
        logp = torch.log_softmax(logits, dim=-1)
        return logp.gather(1, labels[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)

    assert _peak(plain, [logits], []) >= 4.0


def test_the_tracker_counts_storages_once_and_forgets_freed_ones() -> None:
    base = torch.zeros(100)
    with StorageTracker() as tracker:
        view = base[10:].add_(1.0)
        assert tracker.live_bytes == 400
        other = view + 1.0
        assert tracker.live_bytes == 400 + 360
        del other
        assert tracker.live_bytes == 400
    assert tracker.peak_bytes == 760
    with StorageTracker(base) as tracker:
        base.add_(1.0)
    assert tracker.peak_bytes == 0

"""The fused language-model head against the unfused one, and where the weight's gradient goes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aer_megatron.parallel.fused_head import fused_linear_logprob_entropy
from aer_megatron.parallel.vocab import vocab_parallel_logprob_entropy

TOKENS, HIDDEN, COLUMNS, REAL = 37, 16, 130, 121


class Case:
    """Seeded hidden states, head, labels and per-token gradients."""

    def __init__(self, dtype: torch.dtype, tokens: int = TOKENS) -> None:
        generator = torch.Generator().manual_seed(2)
        self.hidden = torch.randn(tokens, HIDDEN, generator=generator).to(dtype).requires_grad_()
        self.weight = torch.randn(COLUMNS, HIDDEN, generator=generator).to(dtype).requires_grad_()
        self.labels = torch.randint(0, REAL, (tokens,), generator=generator)
        self.grads = torch.randn(2, tokens, generator=generator)

    def loss(self, result: tuple[Tensor | None, ...]) -> Tensor:
        logprob, entropy = result[:2]
        assert logprob is not None and entropy is not None
        return (logprob * self.grads[0] + entropy * self.grads[1]).sum()

    def fused_loss(self, chunk_tokens: int | None = 5) -> Tensor:
        return self.loss(
            fused_linear_logprob_entropy(
                self.hidden,
                self.weight,
                self.labels,
                vocab_size=REAL,
                temperature=0.8,
                chunk_tokens=chunk_tokens,
            )
        )

    def plain_gradients(self) -> tuple[Tensor, Tensor]:
        """Returns the gradients through given logits, from float64 copies of the same inputs."""
        hidden = self.hidden.detach().double().requires_grad_()
        weight = self.weight.detach().double().requires_grad_()
        result = vocab_parallel_logprob_entropy(hidden @ weight.t(), self.labels, vocab_size=REAL, temperature=0.8)
        hidden_grad, weight_grad = torch.autograd.grad(self.loss(result), (hidden, weight))
        return hidden_grad, weight_grad


def _error(got: Tensor | None, wanted: Tensor) -> float:
    assert got is not None
    return float((got.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("chunk_tokens", [None, 1, 5, 100])
def test_gradients_equal_the_unfused_form(dtype: torch.dtype, bar: float, chunk_tokens: int | None) -> None:
    """bfloat16 rounds logits and their gradient to 2^-9, as a bfloat16 head does anyway."""
    case = Case(dtype)
    hidden_grad, weight_grad = case.plain_gradients()
    case.fused_loss(chunk_tokens).backward()
    assert _error(case.hidden.grad, hidden_grad) <= bar
    assert _error(case.weight.grad, weight_grad) <= bar
    assert case.weight.grad is not None and case.weight.grad.dtype == dtype
    assert bool((case.weight.grad[REAL:] == 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_equal_the_unfused_form_on_the_same_logits(dtype: torch.dtype) -> None:
    case = Case(dtype)
    logits = (case.hidden @ case.weight.t()).detach()
    options = {"vocab_size": REAL, "temperature": 0.8, "with_statistics": True}
    plain = vocab_parallel_logprob_entropy(logits, case.labels, **options)
    fused = fused_linear_logprob_entropy(case.hidden, case.weight, case.labels, **options)
    for one, two in zip(plain, fused, strict=True):
        assert one is not None and two is not None
        assert torch.allclose(one, two, rtol=0, atol=5e-6)


def test_gradcheck_in_float64() -> None:
    case = Case(torch.float64, tokens=3)
    weight = case.weight.detach()[:9].clone().requires_grad_()
    labels = case.labels % 7

    def function(hidden: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
        result = fused_linear_logprob_entropy(hidden, head, labels, vocab_size=7, chunk_tokens=2)
        return result.logprob_T, result.entropy_T

    assert torch.autograd.gradcheck(function, (case.hidden, weight))


@pytest.mark.parametrize("main_dtype", [torch.float32, torch.bfloat16])
def test_weight_gradient_adds_to_main_grad_and_leaves_nothing_else(main_dtype: torch.dtype) -> None:
    case = Case(torch.float32)
    _, weight_grad = case.plain_gradients()
    case.weight.main_grad = torch.ones(COLUMNS, HIDDEN, dtype=main_dtype)  # type: ignore[attr-defined]
    case.fused_loss().backward()
    case.fused_loss().backward()  # a second micro-batch
    bar = 1e-6 if main_dtype == torch.float32 else 1e-2
    assert _error(case.weight.main_grad, 2 * weight_grad + 1.0) <= bar  # type: ignore[attr-defined]
    assert case.weight.grad is None


def test_bfloat16_weight_gradient_is_summed_in_float32_over_chunks() -> None:
    """64 chunks of one token: adding bfloat16 products to a bfloat16 sum would lose several bits."""
    case = Case(torch.bfloat16, tokens=64)
    case.weight.main_grad = torch.zeros(COLUMNS, HIDDEN)  # type: ignore[attr-defined]
    case.fused_loss(chunk_tokens=64).backward()
    whole = case.weight.main_grad.double()  # type: ignore[attr-defined]
    case.weight.main_grad = torch.zeros(COLUMNS, HIDDEN)  # type: ignore[attr-defined]
    case.fused_loss(chunk_tokens=1).backward()
    assert _error(case.weight.main_grad, whole) <= 1e-3  # type: ignore[attr-defined]


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_input_gets_no_gradient(frozen: str) -> None:
    case = Case(torch.float32)
    hidden_grad, weight_grad = case.plain_gradients()
    getattr(case, frozen).requires_grad_(False)
    case.fused_loss().backward()
    assert getattr(case, frozen).grad is None
    if frozen == "weight":
        assert _error(case.hidden.grad, hidden_grad) <= 2e-6
    else:
        assert _error(case.weight.grad, weight_grad) <= 2e-6


def test_nothing_is_saved_without_gradients() -> None:
    case = Case(torch.float32)
    with torch.no_grad():
        assert not case.fused_loss().requires_grad
    assert case.fused_loss().requires_grad


def test_no_tokens_leave_main_grad_alone() -> None:
    case = Case(torch.float32, tokens=0)
    case.weight.main_grad = torch.ones(COLUMNS, HIDDEN)  # type: ignore[attr-defined]
    case.fused_loss(None).backward()
    assert bool((case.weight.main_grad == 1).all())  # type: ignore[attr-defined]
    assert case.hidden.grad is not None and case.hidden.grad.shape == (0, HIDDEN)


def test_second_derivative_raises() -> None:
    case = Case(torch.float32)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(case.fused_loss(), case.hidden, create_graph=True)


def test_bad_input_is_named() -> None:
    case = Case(torch.float32)
    with pytest.raises(ValueError, match=r"\[T, H\] and \[W, H\]"):
        fused_linear_logprob_entropy(case.hidden, case.weight.t(), case.labels)
    with pytest.raises(ValueError, match=r"hidden_TH is torch.float32 but weight_WH torch.bfloat16"):
        fused_linear_logprob_entropy(case.hidden, case.weight.bfloat16(), case.labels)
    with pytest.raises(ValueError, match="outside"):
        fused_linear_logprob_entropy(case.hidden, case.weight, case.labels + COLUMNS)

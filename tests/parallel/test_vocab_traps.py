"""The known mistakes around entropy on logits: each test passes on ours and fails on the wrong form of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from aer_megatron.algo.entropy import logprob_entropy
from aer_megatron.parallel.vocab import vocab_parallel_logprob_entropy
from tests.support import vocab_mutants as mutants
from tests.support.storage_tracker import StorageTracker

Form = Callable[..., Any]
TOKENS, COLUMNS, REAL = 24, 96, 80


@pytest.fixture
def case() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    logits = 3 * torch.randn(TOKENS, COLUMNS, generator=generator)
    return logits, torch.randint(0, REAL, (TOKENS,), generator=generator)


def _non_leaf(logits: Tensor) -> Tensor:
    return logits.clone().requires_grad_() * 1.0


def _fails(check: Callable[..., None], form: Form, *args: Any) -> None:
    with pytest.raises(AssertionError):
        check(form, *args)


def test_forward_leaves_float32_logits_alone(case: tuple[Tensor, Tensor]) -> None:
    def check(form: Form, logits: Tensor, labels: Tensor) -> None:
        given = logits.clone()
        form(given, labels, vocab_size=REAL)
        assert torch.equal(given, logits)

    check(vocab_parallel_logprob_entropy, *case)
    _fails(check, mutants.float_alias, *case)


def test_minus_inf_logits_give_no_nan(case: tuple[Tensor, Tensor]) -> None:
    def check(form: Form, logits: Tensor, labels: Tensor) -> None:
        masked = logits.clone()
        masked[:, 3::7] = -torch.inf
        expected = logprob_entropy(masked, labels, vocab_size=REAL, temperature=1.0)
        given = _non_leaf(masked)
        given.retain_grad()
        logprob, entropy = form(given, labels, vocab_size=REAL)[:2]
        assert torch.equal(logprob == -torch.inf, expected.logprob_T == -torch.inf)
        assert bool((entropy - expected.entropy_T).abs().max() < 2e-5)
        entropy.sum().backward()
        assert bool(given.grad.isfinite().all())

    check(vocab_parallel_logprob_entropy, *case)
    _fails(check, mutants.nan_from_minus_inf, *case)


def test_second_consumer_of_the_logits_raises(case: tuple[Tensor, Tensor]) -> None:
    def check(form: Form, logits: Tensor, labels: Tensor) -> None:
        given = _non_leaf(logits)
        squares = given.square().sum()  # saves the logits
        form(given, labels, vocab_size=REAL)[1].sum().backward(retain_graph=True)
        raised = ""
        try:
            squares.backward()
        except RuntimeError as error:
            raised = str(error)
        assert "modified by an inplace operation" in raised

    check(vocab_parallel_logprob_entropy, *case)
    _fails(check, _both_gradients(mutants.destructive_without_version_bump), *case)


def _both_gradients(form: Form) -> Form:
    """Returns the form with an entropy that also depends on the logprob: the mutants take no None gradient."""

    def wrapped(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        logprob, entropy = form(*args, **options)
        return logprob, entropy + 0.0 * logprob

    return wrapped


def test_second_backward_raises_one_clear_sentence(case: tuple[Tensor, Tensor]) -> None:
    def check(form: Form, logits: Tensor, labels: Tensor) -> None:
        total = form(_non_leaf(logits), labels, vocab_size=REAL)[1].sum()
        total.backward(retain_graph=True)
        raised = ""
        try:
            total.backward()
        except RuntimeError as error:
            raised = str(error)
        assert "cannot run backward twice" in raised and "inplace=False" in raised

    check(vocab_parallel_logprob_entropy, *case)
    _fails(check, _both_gradients(mutants.destructive_without_version_bump), *case)


def test_second_derivative_raises_one_clear_sentence(case: tuple[Tensor, Tensor]) -> None:
    def check(form: Form, logits: Tensor, labels: Tensor) -> None:
        given = _non_leaf(logits)
        raised = ""
        try:
            torch.autograd.grad(form(given, labels, vocab_size=REAL)[1].sum(), given, create_graph=True)
        except RuntimeError as error:
            raised = str(error)
        assert "no second derivative" in raised

    check(vocab_parallel_logprob_entropy, *case)
    _fails(check, _both_gradients(mutants.destructive_without_version_bump), *case)


def test_padded_vocabulary_takes_no_part(case: tuple[Tensor, Tensor]) -> None:
    def check(form: Form, logits: Tensor, labels: Tensor) -> None:
        entropies = [form(logits[:, :columns], labels, vocab_size=REAL)[1] for columns in (REAL, COLUMNS)]
        assert torch.allclose(*entropies, atol=1e-6, rtol=0)

    check(vocab_parallel_logprob_entropy, *case)
    _fails(check, mutants.padding_counted, *case)


def test_temperature_costs_no_copy_of_the_logits() -> None:
    tokens, columns = 256, 512
    unit = tokens * columns * 4
    labels = torch.arange(tokens)

    def check(form: Form) -> None:
        logits = torch.randn(tokens, columns).requires_grad_()
        given = logits.view_as(logits)
        with StorageTracker() as tracker:
            tracker.track(given)
            form(given, labels, vocab_size=columns, temperature=0.7)[1].sum().backward()
        assert tracker.peak_bytes <= 1.2 * unit

    check(vocab_parallel_logprob_entropy)
    _fails(check, mutants.temperature_copy)


def test_entropy_sum_is_not_a_reduced_precision_product() -> None:
    logits = 2 * torch.randn(32, 4096, generator=torch.Generator().manual_seed(1))
    labels = torch.zeros(32, dtype=torch.int64)
    expected = logprob_entropy(logits, labels, vocab_size=4096, temperature=1.0).entropy_T

    def check(form: Form) -> None:
        assert bool((form(logits, labels, vocab_size=4096)[1] - expected).abs().max() <= 2e-5)

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")  # what allows reduced-precision products
    try:
        check(vocab_parallel_logprob_entropy)
    finally:
        torch.set_float32_matmul_precision(before)
    _fails(check, mutants.reduced_precision_product)


def test_bfloat16_logits_are_reduced_in_float32() -> None:
    logits = (2 * torch.randn(32, 4096, generator=torch.Generator().manual_seed(1))).bfloat16()
    labels = torch.zeros(32, dtype=torch.int64)
    expected = logprob_entropy(logits, labels, vocab_size=4096, temperature=1.0).entropy_T

    def check(form: Form) -> None:
        assert bool((form(logits, labels, vocab_size=4096)[1] - expected).abs().max() <= 1e-3)

    check(vocab_parallel_logprob_entropy)
    _fails(check, mutants.bfloat16_reductions)


def test_top_k_over_the_batch_does_not_depend_on_micro_batches(case: tuple[Tensor, Tensor]) -> None:
    """Per-token entropies are the same however the batch is cut, so a rule over the batch sees the batch."""
    logits, labels = case
    logits = logits * torch.linspace(0.1, 3.0, TOKENS)[:, None]  # later tokens are surer
    whole = vocab_parallel_logprob_entropy(logits, labels, vocab_size=REAL).entropy_T
    expected = torch.zeros(TOKENS, dtype=torch.bool).index_fill(0, whole.topk(8).indices, True)

    def top_8_of_micro_batches(parts: int) -> Tensor:
        cut = [
            vocab_parallel_logprob_entropy(x, y, vocab_size=REAL).entropy_T
            for x, y in zip(logits.chunk(parts), labels.chunk(parts), strict=True)
        ]
        return torch.zeros(TOKENS, dtype=torch.bool).index_fill(0, torch.cat(cut).topk(8).indices, True)

    for parts in (1, 2, 4):
        assert torch.equal(top_8_of_micro_batches(parts), expected)
    assert not torch.equal(mutants.top_k_per_micro_batch(whole, 8, 4), expected)

"""Log-probability and entropy on given logits: golden values, accuracy, gradient, options, errors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from aer_megatron.algo.entropy import LogprobEntropy, logprob_entropy, logprob_entropy_gradient
from aer_megatron.parallel.vocab import vocab_parallel_logprob_entropy
from aer_megatron.parallel.vocab_eager import EagerKernel
from aer_megatron.parallel.vocab_shard import (
    VocabShard,
    chunks,
    combine_statistics,
    empty_statistics,
    rows_per_chunk,
    token_gradient,
)


def _case(tokens: int, columns: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, columns, (tokens,), generator=generator)
    return (
        logits.to(dtype),
        labels,
        torch.randn(tokens, generator=generator),
        torch.randn(tokens, generator=generator),
    )


def _gradient_in_place(
    logits: Tensor, labels: Tensor, grad_logprob: Tensor, grad_entropy: Tensor, **options: object
) -> tuple[LogprobEntropy, Tensor]:
    given = logits.clone()
    leaf = given.requires_grad_()
    result = vocab_parallel_logprob_entropy(leaf.view_as(leaf), labels, **options)  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad((result.logprob_T * grad_logprob + result.entropy_T * grad_entropy).sum(), leaf)
    return result, gradient


def test_golden_values_by_hand() -> None:
    """p = (1/4, 3/4, 0): H = 2 log 2 - 3/4 log 3; and uniform over 4."""
    logits = torch.tensor([[0.0, math.log(3.0), -math.inf, -math.inf], [7.0, 7.0, 7.0, 7.0]])
    result = vocab_parallel_logprob_entropy(logits, torch.tensor([1, 2]), with_statistics=True)
    assert result.logprob_T.tolist() == pytest.approx([math.log(0.75), -math.log(4.0)], abs=1e-6)
    assert result.entropy_T.tolist() == pytest.approx(
        [2 * math.log(2.0) - 0.75 * math.log(3.0), math.log(4.0)], abs=1e-6
    )
    assert result.top1_prob_T is not None and result.top1_prob_T.tolist() == pytest.approx([0.75, 0.25])
    assert result.sum_sq_prob_T is not None and result.sum_sq_prob_T.tolist() == pytest.approx([0.625, 0.25])


def test_golden_geometry_by_hand() -> None:
    """At p = (1/4, 3/4), y = 1: d logp = (-1/4, 1/4), dH = 3/16 log 3 (1, -1); -inf columns change nothing."""
    logits = torch.tensor([[0.0, math.log(3.0), -math.inf]])
    result = vocab_parallel_logprob_entropy(logits, torch.tensor([1]), with_statistics=True)
    slope = 3 / 16 * math.log(3.0)
    values = [result.logprob_grad_sq_T, result.entropy_grad_sq_T, result.grad_dot_T]
    assert [float(value) for value in values if value is not None] == pytest.approx(
        [2 / 16, 2 * slope**2, -slope / 2], abs=1e-6
    )


def test_golden_gradient_by_hand() -> None:
    """At p = (1/4, 3/4): d log p_1 = (-1/4, 1/4) and dH/dx_0 = -p_0 (log p_0 + H) = 3/16 log 3."""
    logits = torch.tensor([[0.0, math.log(3.0)]])
    one, zero = torch.ones(1), torch.zeros(1)
    by_logprob = _gradient_in_place(logits, torch.tensor([1]), one, zero)[1]
    by_entropy = _gradient_in_place(logits, torch.tensor([1]), zero, one)[1]
    assert by_logprob[0].tolist() == pytest.approx([-0.25, 0.25], abs=1e-6)
    slope = 3 / 16 * math.log(3.0)
    assert by_entropy[0].tolist() == pytest.approx([slope, -slope], abs=1e-6)


def test_reference_agrees_with_autograd_of_the_textbook_form() -> None:
    logits, labels, grad_logprob, grad_entropy = _case(7, 11, torch.float64)
    leaf = logits.clone().requires_grad_()
    categorical = torch.distributions.Categorical(logits=leaf[:, :9] / 1.7)
    labels = labels % 9
    total = (categorical.log_prob(labels) * grad_logprob + categorical.entropy() * grad_entropy).sum()
    total.backward()
    result = logprob_entropy(logits, labels, temperature=1.7, vocab_size=9)
    assert torch.allclose(result.entropy_T, categorical.entropy().detach(), atol=1e-12)
    gradient = logprob_entropy_gradient(logits, labels, grad_logprob, grad_entropy, temperature=1.7, vocab_size=9)
    assert leaf.grad is not None and torch.allclose(gradient, leaf.grad, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "entropy_error", "gradient_error"),
    [(torch.float32, 2e-5, 1e-6), (torch.bfloat16, 1e-3, 5e-3), (torch.float64, 1e-12, 1e-12)],
)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_accuracy_against_float64(
    dtype: torch.dtype, entropy_error: float, gradient_error: float, temperature: float
) -> None:
    """A bfloat16 gradient overwrites bfloat16 logits and is rounded to 2^-9; the entropy is not."""
    tokens, columns, vocab_size = 48, 8192, 8000
    logits, labels, grad_logprob, grad_entropy = _case(tokens, columns, dtype)
    labels = labels % vocab_size
    options = {"vocab_size": vocab_size, "temperature": temperature}
    result, gradient = _gradient_in_place(logits, labels, grad_logprob, grad_entropy, **options, with_statistics=True)
    expected = logprob_entropy(logits, labels, vocab_size=vocab_size, temperature=temperature)
    for got, wanted in zip(result, expected, strict=True):
        assert got is not None and wanted is not None
        assert float((got.detach() - wanted).abs().max()) <= entropy_error
    wanted_gradient = logprob_entropy_gradient(
        logits, labels, grad_logprob, grad_entropy, vocab_size=vocab_size, temperature=temperature
    )
    assert gradient.dtype == dtype
    assert float((gradient - wanted_gradient).norm() / wanted_gradient.norm()) <= gradient_error
    assert bool((gradient[:, vocab_size:] == 0).all())


def test_gradcheck_in_float64() -> None:
    logits, labels, _, _ = _case(5, 9, torch.float64)
    labels = labels % 7
    leaf = logits.requires_grad_()

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        result = vocab_parallel_logprob_entropy(x, labels, vocab_size=7, temperature=1.3, chunk_tokens=2, inplace=False)
        return result.logprob_T, result.entropy_T

    assert torch.autograd.gradcheck(function, (leaf,))


def test_gradient_is_written_over_the_logits() -> None:
    logits, labels, grad_logprob, _ = _case(6, 10, torch.float32)
    given = logits.clone().requires_grad_() * 1.0
    seen: list[Tensor] = []
    given.register_hook(lambda gradient: seen.append(gradient))
    result = vocab_parallel_logprob_entropy(given, labels)
    assert torch.equal(given, logits)
    (result.logprob_T * grad_logprob).sum().backward()
    assert seen[0].data_ptr() == given.data_ptr()
    assert not torch.equal(given, logits)


def test_out_of_place_form_can_run_backward_twice() -> None:
    logits, labels, _, _ = _case(6, 10, torch.float32)
    leaf = logits.clone().requires_grad_()
    total = vocab_parallel_logprob_entropy(leaf, labels, inplace=False).entropy_T.sum()
    (first,) = torch.autograd.grad(total, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(total, leaf)
    assert torch.equal(first, second) and torch.equal(leaf, logits)


def test_in_place_form_refuses_a_leaf() -> None:
    leaf = torch.zeros(2, 4).requires_grad_()
    with pytest.raises(ValueError, match=r"leaf.*inplace=False"):
        vocab_parallel_logprob_entropy(leaf, torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("part", ["logprob", "entropy"])
def test_an_unused_output_contributes_nothing(part: str) -> None:
    logits, labels, weight, _ = _case(6, 10, torch.float64)
    leaf = logits.clone().requires_grad_()
    result = vocab_parallel_logprob_entropy(leaf.view_as(leaf), labels)
    used = result.logprob_T if part == "logprob" else result.entropy_T
    (gradient,) = torch.autograd.grad((used * weight).sum(), leaf)
    zero = torch.zeros_like(weight)
    expected = logprob_entropy_gradient(
        logits,
        labels,
        weight if part == "logprob" else zero,
        weight if part == "entropy" else zero,
        vocab_size=10,
        temperature=1.0,
    )
    assert torch.allclose(gradient, expected, atol=1e-12)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 16, 17, 400])
def test_chunks_do_not_change_the_result(chunk_tokens: int) -> None:
    logits, labels, grad_logprob, grad_entropy = _case(33, 130, torch.float32)
    one, gradient_one = _gradient_in_place(logits, labels, grad_logprob, grad_entropy, chunk_tokens=33)
    cut, gradient_cut = _gradient_in_place(logits, labels, grad_logprob, grad_entropy, chunk_tokens=chunk_tokens)
    assert torch.allclose(one.logprob_T, cut.logprob_T, rtol=1e-6, atol=1e-6)
    assert torch.allclose(one.entropy_T, cut.entropy_T, rtol=1e-6, atol=1e-6)
    assert torch.allclose(gradient_one, gradient_cut, rtol=1e-6, atol=1e-7)


def test_default_chunk_is_the_smaller_of_the_budget_and_a_sixteenth() -> None:
    like = torch.empty(1024, 8)
    assert rows_per_chunk(like, 1024, None, cpu_bytes=1 << 30) == 64
    assert rows_per_chunk(like, 1024, None, cpu_bytes=1 << 16) == 16
    assert rows_per_chunk(like, 1 << 20, None, cpu_bytes=1 << 16) == 1
    assert rows_per_chunk(like[:3], 8, None, cpu_bytes=1 << 16) == 1
    assert [(s.start, s.stop) for s in chunks(7, 3)] == [(0, 3), (3, 6), (6, 7)]


def test_strided_logits_are_accepted() -> None:
    logits, labels, grad_logprob, grad_entropy = _case(6, 10, torch.float32)
    wide = torch.zeros(6, 2, 13)
    wide[:, 1, 2:12] = logits
    wide.requires_grad_()
    window = wide[:, 1, 2:12]
    result = vocab_parallel_logprob_entropy(window, labels)
    (gradient,) = torch.autograd.grad((result.logprob_T * grad_logprob + result.entropy_T * grad_entropy).sum(), wide)
    wanted = _gradient_in_place(logits, labels, grad_logprob, grad_entropy)[1]
    assert torch.equal(gradient[:, 1, 2:12], wanted)


def test_nothing_is_saved_when_no_gradient_is_wanted() -> None:
    logits, labels, _, _ = _case(6, 10, torch.float32)
    given = logits.clone().requires_grad_() * 1.0
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.no_grad():
            quiet = vocab_parallel_logprob_entropy(given, labels)
        assert not saved and not quiet.entropy_T.requires_grad
        constant = vocab_parallel_logprob_entropy(logits, labels)
        assert not saved and not constant.entropy_T.requires_grad
        vocab_parallel_logprob_entropy(given, labels)
        assert saved


def test_statistics_have_no_gradient_and_come_only_when_asked_for() -> None:
    logits, labels, _, _ = _case(6, 10, torch.float32)
    given = logits.clone().requires_grad_() * 1.0
    plain = vocab_parallel_logprob_entropy(given, labels)
    assert plain.top1_prob_T is None and plain.sum_sq_prob_T is None
    asked = vocab_parallel_logprob_entropy(given, labels, with_statistics=True)
    assert asked.top1_prob_T is not None and not asked.top1_prob_T.requires_grad
    assert asked.sum_sq_prob_T is not None and not asked.sum_sq_prob_T.requires_grad
    assert asked.entropy_T.requires_grad


def test_no_tokens_are_fine() -> None:
    given = torch.zeros(0, 10).requires_grad_() * 1.0
    result = vocab_parallel_logprob_entropy(given, torch.zeros(0, dtype=torch.int64))
    assert result.logprob_T.shape == result.entropy_T.shape == (0,)
    result.entropy_T.sum().backward()


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([0, 8], {"vocab_size": 8}, r"\[0, 8\], outside \[0, vocab_size=8\)"),
        ([-100, 1], {}, r"\[-100, 1\].*loss mask"),
        ([0], {}, r"shape \(2,\)"),
        ([0, 1], {"vocab_size": 11}, r"vocab_size=11 must lie in \[1, 10\]"),
        ([0, 1], {"vocab_size": 0}, "vocab_size=0"),
        ([0, 1], {"temperature": 0.0}, "temperature=0.0 must be positive"),
        ([0, 1], {"temperature": math.inf}, "temperature=inf"),
        ([0, 1], {"chunk_tokens": 0}, "chunk_tokens=0 must be at least 1"),
    ],
)
def test_bad_input_is_named(labels: list[int], options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vocab_parallel_logprob_entropy(torch.zeros(2, 10), torch.tensor(labels), **options)  # type: ignore[arg-type]


def test_integer_logits_are_refused() -> None:
    with pytest.raises(ValueError, match="floating-point"):
        vocab_parallel_logprob_entropy(torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))


def test_a_row_of_only_minus_inf_is_nan_and_nan_is_not_hidden() -> None:
    logits = torch.zeros(3, 4)
    logits[0] = -math.inf
    logits[1, 2] = math.nan
    result = vocab_parallel_logprob_entropy(logits, torch.zeros(3, dtype=torch.int64))
    assert result.entropy_T.isnan().tolist() == [True, True, False]


def test_temperature_is_folded_into_the_exponent() -> None:
    shard = VocabShard(0, 4, 4, temperature=0.5, tp_group=None, with_statistics=False)
    assert 2.0 ** (shard.bits_per_logit * 3.0) == pytest.approx(math.exp(3.0 / 0.5))


# Laws: equal to the float64 reference for any shape, split, temperature and logits

ROW_KINDS = ("normal", "large", "equal", "one_hot", "masked", "mostly_masked")


@dataclass(frozen=True)
class Case:
    """Logits with labels and per-token gradients; some tokens have gradient 0, as loss masks give."""

    logits: Tensor
    labels: Tensor
    grads: Tensor
    vocab_size: int
    temperature: float
    chunk_tokens: int | None


def _row(kind: str, columns: int, vocab_size: int, generator: torch.Generator) -> Tensor:
    row = torch.randn(columns, generator=generator, dtype=torch.float64)
    kept = int(torch.randint(0, vocab_size, (1,), generator=generator))
    if kind == "large":
        return torch.where(row > 0, 1e4, -1e4) + row
    if kind == "equal":
        return torch.full_like(row, 1e4)
    if kind == "one_hot":
        return torch.full_like(row, -1e4).index_fill(0, torch.tensor([kept]), 1e4)
    if kind in ("masked", "mostly_masked"):
        drop = torch.rand(columns, generator=generator) < (0.5 if kind == "masked" else 0.95)
        drop[kept] = False
        return (3 * row).masked_fill(drop, -torch.inf)
    return 3 * row


@st.composite
def cases(draw: st.DrawFn) -> Case:
    tokens, columns = draw(st.integers(1, 7)), draw(st.integers(1, 40))
    vocab_size = draw(st.integers(1, columns))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kinds = draw(st.lists(st.sampled_from(ROW_KINDS), min_size=tokens, max_size=tokens))
    grads = torch.randn(2, tokens, generator=generator, dtype=torch.float64)
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)))
    return Case(
        logits=torch.stack([_row(kind, columns, vocab_size, generator) for kind in kinds]),
        labels=torch.randint(0, vocab_size, (tokens,), generator=generator),
        grads=grads * mask,
        vocab_size=vocab_size,
        temperature=draw(st.floats(0.05, 20.0)),
        chunk_tokens=draw(st.one_of(st.none(), st.integers(1, 9))),
    )


def _check(case: Case, logits: Tensor, result: LogprobEntropy, gradient: Tensor, epsilon: float) -> None:
    """Errors are relative to the size of the numbers that the result is a difference of."""
    options = {"vocab_size": case.vocab_size, "temperature": case.temperature}
    wanted = logprob_entropy(logits, case.labels, **options)
    assert torch.equal(result.logprob_T.isinf(), wanted.logprob_T.isinf())
    finite = wanted.logprob_T.isfinite()
    error = (result.logprob_T.detach() - wanted.logprob_T).abs()[finite]
    assert bool((error <= epsilon * (20 + wanted.logprob_T.abs()[finite])).all())
    assert bool(((result.entropy_T.detach() - wanted.entropy_T).abs() <= 20 * epsilon).all())
    assert bool((result.entropy_T >= 0).all())
    for statistic, expected in zip(result[2:], wanted[2:], strict=True):
        assert statistic is not None and expected is not None
        assert bool(((statistic - expected).abs() <= 20 * epsilon).all())
    wanted_gradient = logprob_entropy_gradient(logits, case.labels, *case.grads, **options)
    size = (case.grads[0].abs() + 5 * case.grads[1].abs()) / case.temperature
    assert bool(((gradient - wanted_gradient).abs() <= 10 * epsilon * size[:, None]).all())
    assert bool((gradient[:, case.vocab_size :] == 0).all())


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases(), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_whole_vocabulary_equals_the_reference(case: Case, dtype: torch.dtype) -> None:
    leaf = case.logits.to(dtype).requires_grad_()
    result = vocab_parallel_logprob_entropy(
        leaf,
        case.labels,
        vocab_size=case.vocab_size,
        temperature=case.temperature,
        chunk_tokens=case.chunk_tokens,
        with_statistics=True,
        inplace=False,
    )
    finite = torch.where(result.logprob_T.isfinite(), result.logprob_T, 0.0)
    (gradient,) = torch.autograd.grad((finite * case.grads[0] + result.entropy_T * case.grads[1]).sum(), leaf)
    lost = ~result.logprob_T.isfinite()
    kept = Case(**{**vars(case), "grads": case.grads * torch.stack([~lost, torch.ones_like(lost)])})
    _check(kept, leaf.detach(), result, gradient.detach(), torch.finfo(dtype).eps * 4)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases(), ranks=st.integers(1, 5), extra=st.integers(0, 30))
def test_any_split_into_shards_equals_the_reference(case: Case, ranks: int, extra: int) -> None:
    """Shards of equal size, padding inside a shard and shards of nothing but padding, without processes."""
    width = -(-case.logits.shape[1] // ranks) + extra
    logits = torch.nn.functional.pad(case.logits, (0, ranks * width - case.logits.shape[1]), value=9e9).float()
    shards = [
        VocabShard(
            start=rank * width,
            width=min(max(case.vocab_size - rank * width, 0), width),
            vocab_size=case.vocab_size,
            temperature=case.temperature,
            tp_group=None,
            with_statistics=True,
        )
        for rank in range(ranks)
    ]
    tokens = logits.shape[0]
    stats_RKT = torch.stack([empty_statistics(tokens, shard, logits) for shard in shards])
    kernels = [EagerKernel(shard, tokens, logits) for shard in shards]
    parts = [logits[:, shard.start : shard.start + shard.width] for shard in shards]
    for kernel, part, stats_KT in zip(kernels, parts, stats_RKT, strict=True):
        kernel.reduce_rows(part, case.labels - kernel.shard.start, stats_KT)
    result, state = combine_statistics(stats_RKT, shards[0])
    gradient = token_gradient(state, case.grads[0].float(), case.grads[1].float(), case.temperature)
    out = torch.zeros_like(logits)
    for kernel, part in zip(kernels, parts, strict=True):
        shard = kernel.shard
        window = out[:, shard.start : shard.start + shard.width]
        kernel.write_gradient(part, case.labels - shard.start, gradient, window)
    _check(case, logits, result, out, torch.finfo(torch.float32).eps * 4)

"""Log-probability and entropy equal the float64 reference for any shape, split, temperature and logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from aer_megatron.algo.entropy import LogprobEntropy, logprob_entropy, logprob_entropy_gradient
from aer_megatron.parallel.vocab import vocab_parallel_logprob_entropy
from aer_megatron.parallel.vocab_eager import EagerKernel
from aer_megatron.parallel.vocab_shard import (
    VocabShard,
    combine_statistics,
    empty_statistics,
    token_gradient,
)

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

"""Log-probability and entropy of vocabulary-sharded logits: exact, one collective, one buffer.

The forward pass reads the logits in chunks of tokens and keeps three numbers per token; the backward pass
writes the gradient over the logits, so that forward and backward together need the logits and two chunk
buffers. The arithmetic and its derivation are in vocab_shard.py, the unsharded float64 oracle in
algo/entropy.py, and the form that never holds the logits at all in fused_head.py.

Shape suffixes: T tokens, W columns of this rank's vocabulary shard.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from aer_megatron.algo.entropy import LogprobEntropy
from aer_megatron.parallel.vocab_kernel import choose_kernel
from aer_megatron.parallel.vocab_shard import (
    TokenState,
    VocabShard,
    check_labels,
    chunks,
    combine_statistics,
    describe_shard,
    empty_statistics,
    gather_statistics,
    rows_per_chunk,
    token_gradient,
)

__all__ = ["LogprobEntropy", "vocab_parallel_logprob_entropy"]

# Two chunk buffers of this size stay in a core's private cache, where everything but exp2 is nearly free.
_CPU_CHUNK_BYTES = 1 << 20


def vocab_parallel_logprob_entropy(
    logits_TW: Tensor,
    labels_T: Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    with_statistics: bool = False,
    inplace: bool = True,
) -> LogprobEntropy:
    """Returns log p(label) and the entropy in nats of p = softmax(logits / temperature), per token.

    Both are [T], float64 for float64 logits and else float32, differentiable, and bitwise equal on all ranks of
    `tp_group`. A row of nothing but -inf has no distribution and gives NaN; other -inf logits are fine.

    With `inplace` the BACKWARD pass overwrites the logits with their gradient (the forward pass leaves them alone):
    read whatever else you need from them before it. An autograd consumer that saved them raises torch's version
    error, and a second backward pass raises. Nothing is saved when the logits need no gradient.

    Args:
        logits_TW: [T, W] float32, bfloat16, float16 or float64; rank r holds the columns [r W, (r + 1) W). Half
            precision stays what it is: it is raised to float32 one chunk at a time.
        labels_T: [T] int64 token ids, the same on every rank, whichever rank owns the column.
        tp_group: the group that shares the vocabulary; None means that the logits are whole, never the world.
        vocab_size: columns from here on (over all ranks) are padding and take no part; None means that none are.
        temperature: the logits are divided by it.
        chunk_tokens: rows per chunk of the PyTorch form; None means the smaller of a byte budget and T / 16.
        with_statistics: also return top-1 probability, sum p^2 and the gradients' geometry, from the same pass.
        inplace: False writes the gradient to a new tensor: for leaf logits and repeated backward passes.

    Communication: one all-gather of four (with statistics seven) numbers per token; none in the backward pass.

    Raises:
        ValueError: a label outside [0, vocab_size), or impossible shapes and options.
        RuntimeError: a second backward pass with `inplace`, or a second derivative.
    """
    if logits_TW.dim() != 2 or not logits_TW.is_floating_point():
        raise ValueError(
            f"logits_TW has shape {tuple(logits_TW.shape)} and dtype {logits_TW.dtype}; "
            "it must be a floating-point [T, W]"
        )
    shard = describe_shard(
        logits_TW.shape[1],
        tp_group=tp_group,
        vocab_size=vocab_size,
        temperature=temperature,
        with_statistics=with_statistics,
    )
    check_labels(labels_T, logits_TW.shape[0], shard.vocab_size)
    chunk = rows_per_chunk(logits_TW, shard.width, chunk_tokens, _CPU_CHUNK_BYTES)
    if not (torch.is_grad_enabled() and logits_TW.requires_grad):
        return _forward(logits_TW.detach(), labels_T, shard, chunk)[0]
    if inplace and logits_TW.is_leaf:
        raise ValueError(
            "logits_TW is a leaf, whose values an in-place backward pass would replace by its gradient; "
            "pass the output of the model, or inplace=False"
        )
    outputs = _InPlaceLogprobEntropy.apply(logits_TW, labels_T, shard, chunk, inplace)
    return LogprobEntropy(*outputs)


def _forward(logits_TW: Tensor, labels_T: Tensor, shard: VocabShard, chunk: int) -> tuple[LogprobEntropy, TokenState]:
    stats_KT = empty_statistics(logits_TW.shape[0], shard, logits_TW)
    kernel = choose_kernel(shard, chunk, logits_TW)
    column_T = labels_T - shard.start
    for rows in chunks(logits_TW.shape[0], kernel.chunk_rows):
        kernel.reduce_rows(logits_TW[rows, : shard.width], column_T[rows], stats_KT[:, rows])
    return combine_statistics(gather_statistics(stats_KT, shard), shard)


class _InPlaceLogprobEntropy(torch.autograd.Function):
    """The autograd form; its backward pass consumes the logits unless `inplace` is False."""

    @staticmethod
    def forward(
        ctx: Any, logits_TW: Tensor, labels_T: Tensor, shard: VocabShard, chunk: int, inplace: bool
    ) -> tuple[Tensor | None, ...]:
        result, state = _forward(logits_TW.detach(), labels_T, shard, chunk)
        ctx.save_for_backward(logits_TW, labels_T, *state)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(s for s in result[2:] if s is not None))
        ctx.shard, ctx.chunk, ctx.inplace, ctx.consumed = shard, chunk, inplace, False
        return tuple(result)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        if ctx.consumed:
            raise RuntimeError(
                "vocab_parallel_logprob_entropy cannot run backward twice: the first backward pass overwrote "
                "the logits with their gradient; pass inplace=False to keep them"
            )
        logits_TW, labels_T, *state = ctx.saved_tensors
        grad_logprob_T, grad_entropy_T = grads[:2]
        if grad_logprob_T is None and grad_entropy_T is None:
            return None, None, None, None, None
        ctx.consumed = ctx.inplace
        logits_TW = logits_TW.detach()  # shares the version counter: whoever else saved the logits will raise
        out_TW = logits_TW if ctx.inplace else torch.empty_like(logits_TW)
        shard: VocabShard = ctx.shard
        gradient = token_gradient(TokenState(*state), grad_logprob_T, grad_entropy_T, shard.temperature)
        column_T = labels_T - shard.start
        kernel = choose_kernel(shard, ctx.chunk, logits_TW)
        for rows in chunks(logits_TW.shape[0], kernel.chunk_rows):
            real = (rows, slice(0, shard.width))
            kernel.write_gradient(logits_TW[real], column_T[rows], gradient.rows(rows), out_TW[real])
        out_TW[:, shard.width :] = 0.0
        if ctx.inplace:
            torch.autograd.graph.increment_version(logits_TW)  # a kernel's write is invisible to autograd
        return out_TW, None, None, None, None


def refuse_second_derivative() -> None:
    """Raises RuntimeError inside a backward pass that records a graph (create_graph=True)."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "log-probability and entropy have no second derivative here: call backward without create_graph=True"
        )

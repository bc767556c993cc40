"""Language-model head, log-probability and entropy in one: the logits never exist beyond a chunk of tokens.

The forward pass computes the logits chunk by chunk and keeps three numbers per token; the backward pass
computes each chunk again, turns it into its gradient in place and multiplies it out. The price is one more
matrix product, the gain is that memory no longer grows with tokens x vocabulary. The arithmetic is in
vocab_shard.py.

Shape suffixes: T tokens, H hidden size, W columns of this rank's vocabulary shard, C tokens of one chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from aer_megatron.algo.entropy import LogprobEntropy
from aer_megatron.costs.memory import WEIGHT_BLOCK
from aer_megatron.parallel.vocab import refuse_second_derivative
from aer_megatron.parallel.vocab_kernel import choose_kernel
from aer_megatron.parallel.vocab_shard import (
    TokenState,
    VocabShard,
    check_labels,
    chunks,
    combine_statistics,
    compute_dtype,
    describe_shard,
    empty_statistics,
    gather_statistics,
    rows_per_chunk,
    sum_over_shards,
    token_gradient,
)

__all__ = ["fused_linear_logprob_entropy"]

# Far larger than for given logits: every chunk reads the whole head twice and its gradient once, so that 64 tokens a
# chunk are twice as fast as 13 at V = 151,936.
_CPU_CHUNK_BYTES = 1 << 26


def fused_linear_logprob_entropy(
    hidden_TH: Tensor,
    weight_WH: Tensor,
    labels_T: Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    with_statistics: bool = False,
) -> LogprobEntropy:
    """Returns log p(label) and the entropy in nats of p = softmax(hidden weight^T / temperature), per token.

    Results, options and errors are those of `vocab_parallel_logprob_entropy`. Matrix products run in the
    dtype of `hidden_TH`; the statistics are float32, float64 for float64.

    Args:
        hidden_TH: [T, H], the rows that enter the loss (select the loss mask first: prompts cost nothing
            then). The same rows on every rank of `tp_group`: with sequence parallelism, gather first.
        weight_WH: [W, H], this rank's shard of the head, in the dtype of `hidden_TH`.

    Gradients:
        hidden_TH: complete on every rank: one all-reduce over `tp_group`, with and without sequence
            parallelism. The gather before it must therefore only split in ITS backward pass, in Megatron-Core
            `gather_from_sequence_parallel_region(..., tensor_parallel_output_grad=False)`; a reduce-scatter
            would count every rank's part R times. T must be the same on all ranks of the group.
        weight_WH: accumulated in float32 over the chunks, into `weight_WH.main_grad` if that is a tensor,
            else returned. With `main_grad`, autograd gets zeros if the weight has Megatron-Core DDP's
            `grad_added_to_main_grad` attribute, because DDP's hook wants a gradient to come, else nothing.
            The attribute itself stays as it is: setting it makes the hook throw away whatever else arrives by
            the ordinary path, such as a tied embedding's gradient, whereas adding zeros is right in every
            case.

    Communication: one all-gather forward, one all-reduce of the hidden gradient backward.
    """
    if hidden_TH.dim() != 2 or weight_WH.dim() != 2 or hidden_TH.shape[1] != weight_WH.shape[1]:
        raise ValueError(
            f"hidden_TH has shape {tuple(hidden_TH.shape)} and weight_WH {tuple(weight_WH.shape)}; "
            "they must be [T, H] and [W, H]"
        )
    if hidden_TH.dtype != weight_WH.dtype:
        raise ValueError(f"hidden_TH is {hidden_TH.dtype} but weight_WH {weight_WH.dtype}; cast one of them")
    shard = describe_shard(
        weight_WH.shape[0],
        tp_group=tp_group,
        vocab_size=vocab_size,
        temperature=temperature,
        with_statistics=with_statistics,
    )
    check_labels(labels_T, hidden_TH.shape[0], shard.vocab_size)
    chunk = rows_per_chunk(hidden_TH, shard.width, chunk_tokens, _CPU_CHUNK_BYTES)
    if not (torch.is_grad_enabled() and (hidden_TH.requires_grad or weight_WH.requires_grad)):
        return _forward(hidden_TH.detach(), weight_WH.detach(), labels_T, shard, chunk)[0]
    main_grad = getattr(weight_WH, "main_grad", None)
    wants_zeros = hasattr(weight_WH, "grad_added_to_main_grad")
    outputs = _FusedLinearLogprobEntropy.apply(hidden_TH, weight_WH, labels_T, shard, chunk, main_grad, wants_zeros)
    return LogprobEntropy(*outputs)


class _ChunkedHead:
    """The head's real rows, the kernel of its logits, and the buffer that holds one chunk of them."""

    def __init__(self, weight_WH: Tensor, shard: VocabShard, chunk: int) -> None:
        self._weight_WH = weight_WH[: shard.width]
        self.kernel = choose_kernel(shard, chunk, weight_WH)
        buffer_CW = self.kernel.logits_buffer(weight_WH.dtype)
        self._logits_CW = weight_WH.new_empty(chunk, shard.width) if buffer_CW is None else buffer_CW

    def logits(self, hidden_CH: Tensor) -> Tensor:
        """Returns this chunk's logits, in the buffer."""
        return torch.mm(hidden_CH, self._weight_WH.t(), out=self._logits_CW[: hidden_CH.shape[0]])


def _forward(
    hidden_TH: Tensor, weight_WH: Tensor, labels_T: Tensor, shard: VocabShard, chunk: int
) -> tuple[LogprobEntropy, TokenState]:
    stats_KT = empty_statistics(hidden_TH.shape[0], shard, hidden_TH)
    head = _ChunkedHead(weight_WH, shard, chunk)
    column_T = labels_T - shard.start
    for rows in chunks(hidden_TH.shape[0], chunk):
        head.kernel.reduce_rows(head.logits(hidden_TH[rows]), column_T[rows], stats_KT[:, rows])
    return combine_statistics(gather_statistics(stats_KT, shard), shard)


class _WeightGradient:
    """The head's gradient, accumulated in float32 (float64 for float64), in `main_grad` itself if it can
    be."""

    def __init__(self, weight_WH: Tensor, width: int, main_grad_WH: Tensor | None) -> None:
        dtype = compute_dtype(weight_WH.dtype)
        self._main_grad_WH = main_grad_WH
        self._direct = main_grad_WH is not None and main_grad_WH.dtype == dtype
        if self._direct:
            assert main_grad_WH is not None
            self._sum_WH = main_grad_WH
        else:
            self._sum_WH = torch.zeros(weight_WH.shape, dtype=dtype, device=weight_WH.device)
        self._width = width

    def add(self, grad_CW: Tensor, hidden_CH: Tensor) -> None:
        """Adds grad^T hidden; a bfloat16 gradient (on CUDA) is multiplied as such, with a float32 result."""
        sum_WH = self._sum_WH[: self._width]
        if grad_CW.dtype == sum_WH.dtype:
            sum_WH.addmm_(grad_CW.t(), hidden_CH.to(sum_WH.dtype))
            return
        for block in chunks(self._width, WEIGHT_BLOCK):
            sum_WH[block] += torch.mm(grad_CW[:, block].t(), hidden_CH, out_dtype=sum_WH.dtype)

    def finish(self, weight_WH: Tensor, wants_zeros: bool) -> Tensor | None:
        """Returns what autograd is to add to the weight's gradient."""
        if self._main_grad_WH is None:
            return self._sum_WH.to(weight_WH.dtype)
        if not self._direct:
            self._main_grad_WH += self._sum_WH
        return torch.zeros_like(weight_WH) if wants_zeros else None


class _FusedLinearLogprobEntropy(torch.autograd.Function):
    """The autograd form; logits of a chunk are computed again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_WH: Tensor,
        labels_T: Tensor,
        shard: VocabShard,
        chunk: int,
        main_grad: object,
        wants_zeros: bool,
    ) -> tuple[Tensor | None, ...]:
        result, state = _forward(hidden_TH.detach(), weight_WH.detach(), labels_T, shard, chunk)
        ctx.save_for_backward(hidden_TH, weight_WH, labels_T, *state)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(s for s in result[2:] if s is not None))
        ctx.shard, ctx.chunk, ctx.wants_zeros = shard, chunk, wants_zeros
        # Not a saved tensor: every micro-batch adds to main_grad, and autograd would take that for a mistake.
        ctx.main_grad_WH = main_grad if isinstance(main_grad, Tensor) else None
        return tuple(result)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        hidden_TH, weight_WH, labels_T, *state = ctx.saved_tensors
        if grads[0] is None and grads[1] is None:
            return (None,) * 7
        shard: VocabShard = ctx.shard
        gradient = token_gradient(TokenState(*state), grads[0], grads[1], shard.temperature)
        grad_hidden_TH = torch.empty_like(hidden_TH) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = _WeightGradient(weight_WH, shard.width, ctx.main_grad_WH)
        head = _ChunkedHead(weight_WH.detach(), shard, ctx.chunk)
        column_T = labels_T - shard.start
        for rows in chunks(hidden_TH.shape[0], ctx.chunk):
            logits_CW = head.logits(hidden_TH[rows])
            head.kernel.write_gradient(logits_CW, column_T[rows], gradient.rows(rows), logits_CW)
            if grad_hidden_TH is not None:
                torch.mm(logits_CW, weight_WH[: shard.width], out=grad_hidden_TH[rows])
            if grad_weight is not None:
                grad_weight.add(head.kernel.unrounded(logits_CW), hidden_TH[rows])
        del head
        if grad_hidden_TH is not None:
            sum_over_shards(grad_hidden_TH, shard)
        returned_WH = None if grad_weight is None else grad_weight.finish(weight_WH, ctx.wants_zeros)
        return grad_hidden_TH, returned_WH, None, None, None, None, None

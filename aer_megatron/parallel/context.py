"""Context parallelism: every sequence is cut over the ranks of `cp_group`, two chunks each so that causal work is even.

A sequence of L tokens (a multiple of 2 R) falls into 2 R chunks; rank r holds chunk r and chunk 2 R - 1 - r, in this
order ("zig-zag"). Packed sequences are cut one by one, so rank r's tokens of sequence i stay together.

Shape suffixes: T packed tokens of all ranks, t of this rank, R context-parallel ranks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from aer_megatron.parallel.collectives import all_gather_flat, reduce_scatter_flat
from aer_megatron.types import Int64Array


def context_positions(length_B: Int64Array, *, cp_rank: int, cp_size: int) -> Int64Array:
    """Returns the packed positions [t] that this rank holds, sequence by sequence; t = T / R.

    Example: lengths [4, 8], rank 0 of 2: ``[0 3 4 5 10 11]``.

    Raises:
        ValueError: a length that 2 * cp_size does not divide.
    """
    if np.any(length_B % (2 * cp_size)):
        raise ValueError(f"lengths {length_B.tolist()} must be multiples of 2 * cp = {2 * cp_size}: pad them first")
    parts = []
    start = 0
    for length in length_B.tolist():
        chunk = length // (2 * cp_size)
        for index in (cp_rank, 2 * cp_size - 1 - cp_rank):
            parts.append(np.arange(start + index * chunk, start + (index + 1) * chunk, dtype=np.int64))
        start += length
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def gather_context(local: Tensor, cp_group: dist.ProcessGroup) -> Tensor:
    """Returns [R, *local.shape], every rank's tensor; the gradient of all ranks' copies flows back to its owner."""
    result: Tensor = _GatherContext.apply(local, cp_group)  # type: ignore[no-untyped-call]
    return result


class _GatherContext(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, cp_group: dist.ProcessGroup) -> Tensor:
        ctx.cp_group = cp_group
        whole = local.new_empty(dist.get_world_size(cp_group) * local.shape[0], *local.shape[1:])
        all_gather_flat(whole, local.contiguous(), group=cp_group)
        return whole.view(-1, *local.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        own = grads[0].new_empty(grads[0].shape[1:])
        reduce_scatter_flat(own, grads[0].contiguous().flatten(0, 1), group=ctx.cp_group)
        return own, None

"""Chooses what makes the passes over a vocabulary shard's logits; nothing else does.

This file does NOT compute anything.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from aer_megatron.parallel import vocab_triton
from aer_megatron.parallel.vocab_eager import EagerKernel
from aer_megatron.parallel.vocab_shard import TokenGradient, VocabShard
from aer_megatron.parallel.vocab_triton import TritonKernel


class VocabKernel(Protocol):
    """One shard's passes; EagerKernel says what each method does."""

    chunk_rows: int

    def logits_buffer(self, dtype: torch.dtype) -> Tensor | None: ...
    def unrounded(self, grad_CW: Tensor) -> Tensor: ...
    def reduce_rows(self, logits_CW: Tensor, column_C: Tensor, stats_KC: Tensor) -> None: ...
    def write_gradient(self, logits_CW: Tensor, column_C: Tensor, gradient: TokenGradient, out_CW: Tensor) -> None: ...


def choose_kernel(shard: VocabShard, chunk_rows: int, like: Tensor) -> VocabKernel:
    """Returns Triton's kernels where they take logits like ``like``, else PyTorch's form by ``chunk_rows`` tokens."""
    if vocab_triton.supports(like):
        return TritonKernel(shard, max(1, like.shape[0]))
    return EagerKernel(shard, chunk_rows, like)

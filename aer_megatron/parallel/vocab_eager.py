"""PyTorch form of the two passes over a chunk of a vocabulary shard's logits; arithmetic in vocab_shard.py.

The oracle of the Triton form, and what runs on a CPU.

Shape suffixes: C tokens of one chunk, W columns of this rank's vocabulary shard, K statistics per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aer_megatron.parallel.vocab_shard import (
    LABEL_LOGIT,
    MAX,
    MIN_BITS,
    SUM_EXP,
    SUM_EXP_SHIFT,
    SUM_EXP_SQ,
    SUM_EXP_SQ_SHIFT,
    SUM_EXP_SQ_SHIFT_SQ,
    TokenGradient,
    VocabShard,
    compute_dtype,
)


class EagerKernel:
    """Two chunk-sized buffers, allocated once, reused by every chunk and cut to the chunk at hand.

    Args:
        rows: the most tokens of a chunk.
        like: device, and the dtype from which the buffers' own follows.
    """

    def __init__(self, shard: VocabShard, rows: int, like: Tensor) -> None:
        dtype = compute_dtype(like.dtype)
        self.shard = shard
        self.chunk_rows = rows
        self._shift_CW = torch.empty(rows, shard.width, dtype=dtype, device=like.device)
        self._exp_CW = torch.empty_like(self._shift_CW)

    def logits_buffer(self, dtype: torch.dtype) -> Tensor | None:
        """Returns a buffer of a chunk that the passes may be given as their logits; None in another dtype."""
        return self._shift_CW if self._shift_CW.dtype == dtype else None

    def unrounded(self, grad_CW: Tensor) -> Tensor:
        """Returns the gradient that ``write_gradient`` just rounded to ``grad_CW``."""
        return self._shift_CW[: grad_CW.shape[0]]

    def reduce_rows(self, logits_CW: Tensor, column_C: Tensor, stats_KC: Tensor) -> None:
        """Writes this shard's statistics of some rows into ``stats_KC``, which holds an empty shard's.

        ``logits_CW`` holds real columns only and survives, unless it is the ``logits_buffer``. ``column_C`` is the
        label's column, counted from this shard's first: outside [0, width) another shard owns it.
        """
        shard = self.shard
        if shard.width == 0:
            return
        owned_C = (column_C >= 0) & (column_C < shard.width)
        label_C = logits_CW.gather(1, column_C.clamp(0, shard.width - 1)[:, None]).squeeze(1)
        stats_KC[LABEL_LOGIT] = torch.where(owned_C, label_C, 0.0)
        # A row of nothing but -inf keeps a finite maximum here, so that x - max is -inf and not NaN.
        stats_KC[MAX] = logits_CW.amax(dim=-1).clamp_(min=torch.finfo(logits_CW.dtype).min)
        shift_CW, exp_CW = self._shift_and_exp(logits_CW, stats_KC[MAX])
        torch.sum(exp_CW, dim=-1, out=stats_KC[SUM_EXP])
        torch.sum(shift_CW.mul_(exp_CW), dim=-1, out=stats_KC[SUM_EXP_SHIFT])
        if shard.with_statistics:
            # norms, because a product would need a third buffer
            stats_KC[SUM_EXP_SQ] = torch.linalg.vector_norm(exp_CW, dim=-1).square_()
            stats_KC[SUM_EXP_SQ_SHIFT_SQ] = torch.linalg.vector_norm(shift_CW, dim=-1).square_()
            torch.sum(shift_CW.mul_(exp_CW), dim=-1, out=stats_KC[SUM_EXP_SQ_SHIFT])

    def write_gradient(self, logits_CW: Tensor, column_C: Tensor, gradient: TokenGradient, out_CW: Tensor) -> None:
        """Writes d loss / d logits of some rows' real columns into ``out_CW``, which may be ``logits_CW`` itself."""
        shard = self.shard
        if shard.width == 0:
            return
        shift_CW, exp_CW = self._shift_and_exp(logits_CW, gradient.max_T)
        if gradient.slope_T is None:
            shift_CW.copy_(gradient.constant_T[:, None].expand_as(shift_CW))
        else:
            shift_CW.mul_(gradient.slope_T[:, None]).add_(gradient.constant_T[:, None])
        target_CW = out_CW if out_CW.dtype == shift_CW.dtype else shift_CW
        torch.mul(shift_CW, exp_CW, out=target_CW)
        if gradient.label_T is not None:
            owned_C = (column_C >= 0) & (column_C < shard.width)
            index_C1 = column_C.clamp(0, shard.width - 1)[:, None]
            # One index per row, so gather-add-scatter is exact and deterministic where scatter_add_ may not be.
            label_C1 = target_CW.gather(1, index_C1) + torch.where(owned_C, gradient.label_T, 0.0)[:, None]
            target_CW.scatter_(1, index_C1, label_C1)
        if target_CW is not out_CW:
            out_CW.copy_(target_CW)

    def _shift_and_exp(self, logits_CW: Tensor, max_C: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ((x - max) in bits, exp2 of it), each in its buffer."""
        rows = logits_CW.shape[0]
        shift_CW, exp_CW = self._shift_CW[:rows], self._exp_CW[:rows]
        if logits_CW.dtype == shift_CW.dtype:
            torch.sub(logits_CW, max_C[:, None], out=shift_CW)
        else:
            shift_CW.copy_(logits_CW).sub_(max_C[:, None])
        shift_CW.mul_(self.shard.bits_per_logit).clamp_(min=MIN_BITS)
        torch.exp2(shift_CW, out=exp_CW)
        return shift_CW, exp_CW

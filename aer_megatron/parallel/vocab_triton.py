"""Triton kernels of the vocabulary-shard arithmetic: the forward reductions and the pointwise backward pass.

Same maths and same numbers as the PyTorch form in vocab_eager.py, which is their oracle and the fallback:
each pass reads the logits once, needs no buffer, and the backward pass may write over what it reads.
Importing this file needs neither Triton nor CUDA; `supports` says whether the kernels can run on a tensor.

Shape suffixes: C tokens, W columns of this rank's vocabulary shard, K statistics per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aer_megatron.parallel.vocab_shard import TokenGradient, VocabShard

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_REDUCE_BLOCK = 4096
_GRADIENT_BLOCK = 2048


def supports(tensor: Tensor) -> bool:
    """Returns whether the kernels take logits like `tensor`: on a CUDA device, at most float32, rows
    contiguous."""
    return triton is not None and tensor.is_cuda and tensor.dtype in _DTYPES and tensor.stride(-1) == 1


class TritonKernel:
    """The kernels on one shard: no buffers, and all rows may be one chunk. Methods as in ``EagerKernel``."""

    def __init__(self, shard: VocabShard, rows: int) -> None:
        self.shard = shard
        self.chunk_rows = rows

    def logits_buffer(self, dtype: torch.dtype) -> Tensor | None:
        return None

    def unrounded(self, grad_CW: Tensor) -> Tensor:
        return grad_CW

    def reduce_rows(self, logits_CW: Tensor, column_C: Tensor, stats_KC: Tensor) -> None:
        if self.shard.width:
            reduce_rows(logits_CW, column_C, stats_KC, self.shard.bits_per_logit)

    def write_gradient(self, logits_CW: Tensor, column_C: Tensor, gradient: TokenGradient, out_CW: Tensor) -> None:
        if self.shard.width:
            write_gradient(logits_CW, column_C, gradient, out_CW, self.shard.bits_per_logit)


def _block(width: int, largest: int) -> int:
    return min(largest, max(16, int(triton.next_power_of_2(width))))


def reduce_rows(logits_CW: Tensor, column_C: Tensor, stats_KC: Tensor, bits_per_logit: float) -> None:
    """Writes max, sum e, sum e s, label logit and, if K is 7, sum e^2, sum e^2 s, sum e^2 s^2 of every row.

    `logits_CW` has at least one column and contiguous rows; `stats_KC` is float32 with contiguous rows. The
    meaning of the statistics is that of `EagerKernel.reduce_rows`.
    """
    rows, width = logits_CW.shape
    if rows == 0:
        return
    _reduce_kernel[(rows,)](
        logits_CW,
        logits_CW.stride(0),
        column_C.contiguous(),
        stats_KC,
        stats_KC.stride(0),
        width,
        bits_per_logit,
        WITH_SQ=stats_KC.shape[0] == 7,
        BLOCK=_block(width, _REDUCE_BLOCK),
        num_warps=8,
    )


def write_gradient(
    logits_CW: Tensor, column_C: Tensor, gradient: TokenGradient, out_CW: Tensor, bits_per_logit: float
) -> None:
    """Writes d loss / d logits into `out_CW`, which may be `logits_CW`: see `EagerKernel.write_gradient`."""
    rows, width = logits_CW.shape
    if rows == 0:
        return
    block = _block(width, _GRADIENT_BLOCK)
    slope_C, label_C = gradient.slope_T, gradient.label_T
    _gradient_kernel[(rows, triton.cdiv(width, block))](
        logits_CW,
        logits_CW.stride(0),
        out_CW,
        out_CW.stride(0),
        column_C.contiguous(),
        gradient.max_T.contiguous(),
        gradient.constant_T.contiguous(),
        gradient.constant_T if slope_C is None else slope_C.contiguous(),
        gradient.constant_T if label_C is None else label_C.contiguous(),
        width,
        bits_per_logit,
        HAS_SLOPE=slope_C is not None,
        HAS_LABEL=label_C is not None,
        BLOCK=block,
        num_warps=4,
    )


# Kernel parameters have no annotations: the compiler would look `Any` up as a global and refuse it.
if triton is not None:

    @triton.jit
    def _bits(difference, bits_per_logit):
        """Returns the exponent of two, raised to where exp2 is 0; -inf becomes finite and NaN stays NaN."""
        bits = difference * bits_per_logit
        return tl.where(bits < -1100.0, -1100.0, bits)

    @triton.jit
    def _reduce_kernel(
        logits,
        row_stride,
        column,
        stats,
        stats_stride,
        width,
        bits_per_logit,
        WITH_SQ: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """One program per row: running maximum and sums, rescaled when the maximum rises."""
        row = tl.program_id(0).to(tl.int64)
        logits += row * row_stride
        # Finite, so that a row of nothing but -inf has no -inf - -inf.
        running_max = tl.full((), -3.4028234663852886e38, tl.float32)
        sum_exp = tl.full((), 0.0, tl.float32)
        sum_shift = tl.full((), 0.0, tl.float32)
        sum_sq = tl.full((), 0.0, tl.float32)
        sum_sq_shift = tl.full((), 0.0, tl.float32)
        sum_sq_shift_sq = tl.full((), 0.0, tl.float32)
        for first in range(0, width, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            x = tl.load(logits + columns, mask=columns < width, other=float("-inf")).to(tl.float32)
            new_max = tl.maximum(running_max, tl.max(x, axis=0))
            shift = _bits(x - new_max, bits_per_logit)
            exp = tl.exp2(shift)
            rise = _bits(running_max - new_max, bits_per_logit)
            scale = tl.exp2(rise)
            sum_shift = scale * (sum_shift + rise * sum_exp) + tl.sum(exp * shift, axis=0)
            sum_exp = scale * sum_exp + tl.sum(exp, axis=0)
            if WITH_SQ:
                exp_shift = exp * shift
                moved = sum_sq_shift_sq + rise * (2.0 * sum_sq_shift + rise * sum_sq)
                sum_sq_shift_sq = scale * scale * moved + tl.sum(exp_shift * exp_shift, axis=0)
                sum_sq_shift = scale * scale * (sum_sq_shift + rise * sum_sq) + tl.sum(exp * exp_shift, axis=0)
                sum_sq = scale * scale * sum_sq + tl.sum(exp * exp, axis=0)
            running_max = new_max
        label = tl.load(column + row)
        owned = (label >= 0) & (label < width)
        label_logit = tl.load(logits + label, mask=owned, other=0.0).to(tl.float32)
        stats += row
        tl.store(stats, running_max)
        tl.store(stats + stats_stride, sum_exp)
        tl.store(stats + 2 * stats_stride, sum_shift)
        tl.store(stats + 3 * stats_stride, label_logit)
        if WITH_SQ:
            tl.store(stats + 4 * stats_stride, sum_sq)
            tl.store(stats + 5 * stats_stride, sum_sq_shift)
            tl.store(stats + 6 * stats_stride, sum_sq_shift_sq)

    @triton.jit
    def _gradient_kernel(
        logits,
        row_stride,
        out,
        out_stride,
        column,
        max_logit,
        constant,
        slope,
        label_gradient,
        width,
        bits_per_logit,
        HAS_SLOPE: tl.constexpr,
        HAS_LABEL: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """One program per row and block of columns."""
        row = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < width
        x = tl.load(logits + row * row_stride + columns, mask=inside, other=float("-inf")).to(tl.float32)
        shift = _bits(x - tl.load(max_logit + row), bits_per_logit)
        factor = tl.load(constant + row)
        if HAS_SLOPE:
            factor = factor + tl.load(slope + row) * shift
        gradient = tl.exp2(shift) * factor
        if HAS_LABEL:
            gradient += tl.where(columns == tl.load(column + row), tl.load(label_gradient + row), 0.0)
        tl.store(out + row * out_stride + columns, gradient.to(out.dtype.element_ty), mask=inside)

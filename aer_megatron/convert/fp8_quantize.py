"""FP8 quantisation by TransformerEngine's scaling recipes, in plain torch float8 casts.

Values are cast to FP8 after multiplication by a scale and come back as fp32 = FP8 value * inverse scale:

    per tensor   scale = max_fp8 / amax of the tensor (tensorwise), or of the tensor's past (delayed)
    1x128        activations and gradients of the blockwise recipe; 128x128 its weights; scales are powers of two
    1x32         mxfp8: the inverse scale is an E8M0 number, 2^(e - 127), rounded up so that nothing saturates

Scale rules are those of TransformerEngine 2.20 (recipe_common.cuh, delayed_scaling.cu, ptx_arch_spec.cuh), restated.
Casts saturate; NaN stays NaN.

Shape suffixes: M rows, K columns, I blocks of rows, J blocks of columns.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
ScaleRule = Literal["power_of_two", "e8m0", "any"]

_FP32_MAX = torch.finfo(torch.float32).max
_EXPONENT_BITS = -0x800000  # sign and exponent of an fp32 number's bits; the mantissa is masked away


class Quantized(NamedTuple):
    """FP8 values [M, K] with the fp32 factor [I, J] that each block is multiplied by to come back."""

    values_MK: Tensor
    scale_inv_IJ: Tensor
    block: tuple[int, int]

    def dequantize(self) -> Tensor:
        """Returns the represented values, fp32 [M, K]."""
        exact_MK = from_fp8(self.values_MK)
        if self.scale_inv_IJ.numel() == 1:
            return exact_MK.mul_(self.scale_inv_IJ)
        return _by_block(exact_MK, self.scale_inv_IJ, self.block)


def scale_of_amax(amax: Tensor, dtype: torch.dtype, rule: ScaleRule) -> Tensor:
    """Returns the factor, fp32, that takes values up to ``amax`` into the range of ``dtype``; 1 where there is none.

    ``power_of_two`` rounds the factor down to a power of two. ``e8m0`` rounds its inverse up to one: the result is the
    reciprocal of an E8M0 number. An amax of 0, inf or NaN has no factor (``e8m0`` hands NaN on).
    """
    largest = torch.finfo(dtype).max
    if rule == "e8m0":
        return _e8m0_scale(amax * torch.tensor(1.0 / largest, dtype=torch.float32))
    # a tensor by a tensor: torch's scalar / tensor is a reciprocal and a product, one rounding more
    scale = torch.div(torch.full_like(amax, largest), amax).clamp_(max=_FP32_MAX)
    if rule == "power_of_two":
        scale = (scale.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)
    return torch.where(torch.isfinite(amax) & (amax > 0), scale, torch.ones_like(scale))


def _e8m0_scale(inverse: Tensor) -> Tensor:
    bits = inverse.view(torch.int32)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    up = (mantissa > 0) & (exponent != 0xFE) & ~((exponent == 0) & (mantissa <= 0x400000))
    exponent = torch.where(torch.isinf(inverse), 0xFE, exponent + up.int())
    scale = torch.ldexp(torch.ones_like(inverse), 127 - exponent)
    return torch.where(torch.isnan(inverse), inverse, scale)


def delayed_update(
    history_LQ: Tensor, scale_Q: Tensor, dtype: torch.dtype, *, margin: int, algo: str
) -> tuple[Tensor, Tensor]:
    """Returns (amax history [L, Q], scales [Q]) after a pass of delayed scaling over Q tensors.

    Row 0 of the history is the pass that ends; it moves to the far end, the oldest row goes, and row 0 is 0 again.
    scale = max_fp8 / amax / 2^margin with the amax of row 0 (``most_recent``) or of all rows (``max``). A tensor that
    the pass did not see (amax 0) keeps history and scale, one with a non-finite amax its scale.
    """
    latest_Q = history_LQ[0]
    amax_Q = history_LQ.amax(dim=0) if algo == "max" else latest_Q
    # 2^margin goes into the numerator first, as in the kernel
    scaled_max = torch.full_like(amax_Q, torch.finfo(dtype).max * 2.0**-margin)
    fresh_Q = torch.div(scaled_max, amax_Q).clamp_(max=_FP32_MAX)
    usable_Q = torch.isfinite(amax_Q) & (amax_Q > 0) & (latest_Q != 0)
    rolled_LQ = history_LQ.roll(-1, dims=0)
    rolled_LQ[0] = 0.0
    return torch.where(latest_Q != 0, rolled_LQ, history_LQ), torch.where(usable_Q, fresh_Q, scale_Q)


def quantize_tensor(x_MK: Tensor, dtype: torch.dtype, scale: Tensor) -> Quantized:
    """Returns fp32 ``x_MK`` in FP8 under one ``scale`` (fp32, one element); beyond the range it saturates."""
    whole = (max(1, x_MK.shape[0]), max(1, x_MK.shape[1]))
    return Quantized(_to_fp8(x_MK * scale, dtype), scale.reciprocal().reshape(1, 1), whole)


def quantize_blocks(x_MK: Tensor, dtype: torch.dtype, block: tuple[int, int], rule: ScaleRule) -> Quantized:
    """Returns fp32 ``x_MK`` in FP8 with one scale per block of ``block`` (rows, columns); the last may be smaller."""
    block = (min(block[0], max(1, x_MK.shape[0])), min(block[1], max(1, x_MK.shape[1])))
    amax_IJ = _block_amax(x_MK, block)
    scale_IJ = scale_of_amax(amax_IJ, dtype, rule)
    scaled_MK = _by_block(x_MK.clone(), scale_IJ, block)
    return Quantized(_to_fp8(scaled_MK, dtype), scale_IJ.reciprocal(), block)


def amax_of(x: Tensor) -> Tensor:
    """Returns the largest magnitude of a tensor as fp32, without a gradient: 0 of an empty one, NaN of one with NaN."""
    if not x.numel():
        return torch.zeros((), dtype=torch.float32)
    low, high = torch.aminmax(x.detach())
    return torch.maximum(-low, high).float()


def from_fp8(values: Tensor) -> Tensor:
    """Returns FP8 values as fp32, exactly. On a CPU a table is four times as fast as torch's own cast."""
    codes = values.view(torch.uint8)
    return _decoded(values.dtype).to(values.device).index_select(0, codes.reshape(-1).int()).view(values.shape)


def _to_fp8(scaled: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds to nearest even; ``scaled`` is overwritten. Torch's own cast makes NaN or inf of what is out of range."""
    largest = torch.finfo(dtype).max
    return scaled.clamp_(-largest, largest).to(dtype)


@functools.cache
def _decoded(dtype: torch.dtype) -> Tensor:
    return torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype).float()


def _padded(x_MK: Tensor, block: tuple[int, int]) -> Tensor:
    rows, columns = (-size % step for size, step in zip(x_MK.shape, block, strict=True))
    return F.pad(x_MK, (0, columns, 0, rows)) if rows or columns else x_MK


def _block_amax(x_MK: Tensor, block: tuple[int, int]) -> Tensor:
    padded = _padded(x_MK.abs(), block)
    (rows, columns), (num_rows, num_columns) = block, padded.shape
    by_row_IK = padded.view(num_rows // rows, rows, num_columns).amax(dim=1) if rows > 1 else padded
    return by_row_IK.view(-1, num_columns // columns, columns).amax(dim=2)


def _by_block(x_MK: Tensor, factor_IJ: Tensor, block: tuple[int, int]) -> Tensor:
    """Multiplies each block by its factor, in place where the blocks fit."""
    (rows, columns), shape = block, x_MK.shape
    padded = _padded(x_MK, block)
    blocks = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
    blocks.mul_(factor_IJ[:, None, :, None])
    return padded[: shape[0], : shape[1]]

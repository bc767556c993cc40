"""Laws of FP8 rounding, whatever the values."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from aer_megatron.convert.fp8_quantize import E4M3, E5M2, amax_of, quantize_blocks, quantize_tensor, scale_of_amax

# unit roundoff and smallest normal number of the formats
FORMATS = {E4M3: (2.0**-4, 2.0**-6), E5M2: (2.0**-3, 2.0**-14)}
RECIPES = (
    ("any", None),
    ("power_of_two", (1, 128)),
    ("power_of_two", (128, 128)),
    ("e8m0", (1, 32)),
    ("e8m0", (32, 1)),
)


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Values over up to 30 decades, with rows of zeros."""
    rows, columns, seed = draw(st.integers(1, 70)), draw(st.integers(1, 140)), draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    spread = draw(st.sampled_from([0.0, 1.0, 4.0, 15.0]))
    x = torch.randn(rows, columns, generator=generator)
    x *= 10.0 ** (spread * (2 * torch.rand(rows, columns, generator=generator) - 1))
    x[torch.rand(rows, generator=generator) < 0.1] = 0.0
    return x


def rounded(x: Tensor, dtype: torch.dtype, rule: str, block: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    """Returns the rounded values and the inverse scale of every element."""
    if block is None:
        scale = scale_of_amax(amax_of(x), dtype, "any")
        return quantize_tensor(x, dtype, scale).dequantize(), scale.reciprocal().expand_as(x)
    result = quantize_blocks(x, dtype, block, rule)  # type: ignore[arg-type]
    inverse = result.scale_inv_IJ
    for axis in (0, 1):
        inverse = inverse.repeat_interleave(result.block[axis], dim=axis)
    return result.dequantize(), inverse[: x.shape[0], : x.shape[1]]


@given(matrices(), st.sampled_from([E4M3, E5M2]), st.sampled_from(RECIPES))
def test_error_is_half_a_step_and_nothing_saturates(x, dtype, recipe):
    value, inverse = rounded(x, dtype, *recipe)
    roundoff, smallest = FORMATS[dtype]
    normal = x.abs() >= smallest * inverse
    slack = 1 + 2e-6  # of fp32 scales that are no powers of two
    error = (value.double() - x.double()).abs()
    assert bool((error[normal] <= roundoff * slack * x.abs().double()[normal]).all())
    # below the normal numbers steps are even: half of one, roundoff * smallest
    assert bool((error[~normal] <= roundoff * slack * smallest * inverse.double()[~normal]).all())
    assert bool((value * x >= 0).all())


@given(matrices(), st.sampled_from([E4M3, E5M2]), st.sampled_from(RECIPES[1:]))
def test_power_of_two_scales_round_once(x, dtype, recipe):
    once, _ = rounded(x, dtype, *recipe)
    twice, _ = rounded(once, dtype, *recipe)
    assert torch.equal(once, twice)

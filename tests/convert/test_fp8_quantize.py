"""FP8 quantisation against values derived by hand from the formats and from TransformerEngine's scale rules.

e4m3: 1 sign, 4 exponent (bias 7), 3 mantissa bits; largest 448 = 1.75 * 2^8, smallest normal 2^-6, subnormal step 2^-9.
e5m2: 1 sign, 5 exponent (bias 15), 2 mantissa bits; largest 57344 = 1.75 * 2^15.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from aer_megatron.convert.fp8_quantize import (
    E4M3,
    E5M2,
    amax_of,
    delayed_update,
    from_fp8,
    quantize_blocks,
    quantize_tensor,
    scale_of_amax,
)


def test_e4m3_rounds_to_nearest_even_and_saturates() -> None:
    # neighbours in [16, 32) are 2 apart: 17 is a tie between 16 (mantissa 000) and 18 (001) and goes to the even one,
    # 19 one between 18 (001) and 20 (010); 0.004 lies between the subnormals 2 * 2^-9 = 0.00390625 and 3 * 2^-9
    x = torch.tensor([[17.0, 19.0, -17.5, 448.0, 464.0, 1e9, -1e9, 0.004, 2**-10, 0.0, math.inf, -math.inf]])
    expected = [16.0, 20.0, -18.0, 448.0, 448.0, 448.0, -448.0, 2 * 2**-9, 0.0, 0.0, 448.0, -448.0]
    assert quantize_tensor(x, E4M3, torch.ones(())).dequantize().tolist() == [expected]


def test_e5m2_rounds_and_saturates() -> None:
    # neighbours in [4, 8) are 1 apart: 4.5 is a tie and goes to the even mantissa (4), 5.5 to 6 (mantissa 10)
    x = torch.tensor([[4.5, 5.5, 6.2, 57344.0, 61440.0, 1e9, -math.inf]])
    expected = [4.0, 6.0, 6.0, 57344.0, 57344.0, 57344.0, -57344.0]
    assert quantize_tensor(x, E5M2, torch.ones(())).dequantize().tolist() == [expected]


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_nan_stays_nan(dtype: torch.dtype) -> None:
    x = torch.tensor([[1.0, math.nan]])
    tensor = quantize_tensor(x, dtype, scale_of_amax(amax_of(x), dtype, "any")).dequantize()
    assert tensor[0, 0] == 1.0  # an amax of NaN has no scale: 1
    assert tensor[0, 1].isnan()
    assert quantize_blocks(x, dtype, (1, 32), "e8m0").dequantize()[0, 1].isnan()


def test_decoding_table_is_torchs_own_cast() -> None:
    for dtype in (E4M3, E5M2):
        values = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype)
        torch.testing.assert_close(from_fp8(values), values.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("amax", "dtype", "rule", "expected"),
    [
        (448.0, E4M3, "any", 1.0),
        (7.0, E4M3, "any", 64.0),
        (3.0, E4M3, "any", torch.tensor(448.0).div(torch.tensor(3.0)).item()),
        (7.0, E5M2, "any", 8192.0),  # 57344 / 7
        (0.0, E4M3, "any", 1.0),
        (math.inf, E4M3, "any", 1.0),
        (math.nan, E4M3, "power_of_two", 1.0),
        (2.0**-140, E4M3, "any", torch.finfo(torch.float32).max),  # 448 * 2^140 is beyond fp32
        (2.0**-140, E4M3, "power_of_two", 2.0**127),
        (3.0, E4M3, "power_of_two", 128.0),  # 149.33 rounded down
        (3.5, E4M3, "power_of_two", 128.0),  # exact
        (3.5000002, E4M3, "power_of_two", 64.0),
        (0.0, E4M3, "e8m0", 2.0**127),  # exponent 0: the smallest inverse scale, 2^-127
        (448.0, E4M3, "e8m0", 1.0),
        (449.0, E4M3, "e8m0", 0.5),  # 449 / 448 rounded up to 2
        (3.0, E4M3, "e8m0", 128.0),  # 3 / 448 = 0.0067 rounded up to 2^-7
        (57345.0, E5M2, "e8m0", 0.5),
        (math.inf, E4M3, "e8m0", 2.0**-127),
    ],
)
def test_scale(amax: float, dtype: torch.dtype, rule: str, expected: float) -> None:
    scale = scale_of_amax(torch.tensor([amax], dtype=torch.float32), dtype, rule)  # type: ignore[arg-type]
    assert scale.item() == expected


def test_blocks_have_their_own_scales() -> None:
    x = torch.zeros(2, 5)
    x[0, :3] = torch.tensor([0.5, -3.5, 1.0])
    x[1, :3] = torch.tensor([300.0, 0.25, 2.0])
    x[:, 3:] = torch.tensor([[1e-3, 0.0], [0.0, 0.0]])
    rows = quantize_blocks(x, E4M3, (1, 3), "power_of_two")
    # 448 / 3.5 = 128; 448 / 300 = 1.49 -> 1; 448 / 0.001 = 448000 -> 2^18; nothing -> 1
    assert rows.scale_inv_IJ.tolist() == [[1 / 128, 2.0**-18], [1.0, 1.0]]
    # 300 is between 288 and 320 (32 apart): 288; 0.001 * 2^18 = 262.1, neighbours 256 and 288: 256 * 2^-18
    assert rows.dequantize().tolist() == [[0.5, -3.5, 1.0, 2.0**-10, 0.0], [288.0, 0.25, 2.0, 0.0, 0.0]]
    columns = quantize_blocks(x, E4M3, (128, 1), "power_of_two")
    # column maxima 300, 3.5, 2, 0.001, 0
    assert columns.scale_inv_IJ.tolist() == [[1.0, 1 / 128, 1 / 128, 2.0**-18, 1.0]]
    square = quantize_blocks(x, E4M3, (128, 128), "power_of_two")
    assert square.scale_inv_IJ.tolist() == [[1.0]]
    assert square.dequantize()[0].tolist() == [0.5, -3.5, 1.0, 2.0**-9 * 1, 0.0]  # 0.001 -> one subnormal step 0.00195


def test_large_blocks_by_loop() -> None:
    """Shapes that do not divide, against a loop over blocks."""
    x = torch.randn(150, 70, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 4, 70)
    for block in ((1, 32), (32, 1), (128, 128), (1, 128), (128, 1)):
        expected = torch.empty_like(x)
        for i in range(0, 150, block[0]):
            for j in range(0, 70, block[1]):
                part = x[i : i + block[0], j : j + block[1]]
                inverse = 2.0 ** math.ceil(math.log2(part.abs().max().item() / 448))
                expected[i : i + block[0], j : j + block[1]] = (part / inverse).to(E4M3).float() * inverse
        for rule in ("e8m0", "power_of_two"):
            torch.testing.assert_close(
                quantize_blocks(x, E4M3, block, rule).dequantize(),  # type: ignore[arg-type]
                expected,
                rtol=0,
                atol=0,
            )


def test_delayed_scaling_follows_the_history() -> None:
    """Passes with amax 7, 3.5, 14, nothing, inf, 7 of one tensor; history of 3 rows."""
    scales: dict[str, list[float]] = {"max": [], "most_recent": []}
    for algo, seen in scales.items():
        history, scale = torch.zeros(3, 1), torch.ones(1)
        for amax in (7.0, 3.5, 14.0, 0.0, math.inf, 7.0, 7.0, 7.0):
            history[0] = torch.maximum(history[0], torch.tensor([amax]))
            history, scale = delayed_update(history, scale, E4M3, margin=1, algo=algo)
            seen.append(scale.item())
    # 448 / 7 / 2^margin = 32. max: the window of three passes with an amax; inf freezes the scale while it is in there
    assert scales["max"] == [32.0, 32.0, 16.0, 16.0, 16.0, 16.0, 16.0, 32.0]
    assert scales["most_recent"] == [32.0, 64.0, 16.0, 16.0, 16.0, 32.0, 32.0, 32.0]


def test_stale_scale_saturates() -> None:
    x = torch.tensor([[14.0, -14.0, 3.0]])
    # the scale of amax 7: 64, so that +-7 is the range; 3 * 64 = 192 is exact
    assert quantize_tensor(x, E4M3, torch.tensor(64.0)).dequantize().tolist() == [[7.0, -7.0, 3.0]]


def test_empty_tensor() -> None:
    x = torch.zeros(0, 8)
    assert amax_of(x).item() == 0.0
    assert quantize_tensor(x, E4M3, torch.ones(())).dequantize().shape == (0, 8)
    assert quantize_blocks(x, E4M3, (1, 128), "power_of_two").dequantize().shape == (0, 8)
    assert quantize_blocks(x, E4M3, (128, 1), "power_of_two").dequantize().shape == (0, 8)


# Laws of rounding, whatever the values

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

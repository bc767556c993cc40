"""The tensor checksum: what it must tell apart, what it must not; and the meter that computes it beside a stream."""

from __future__ import annotations

import pytest
import torch

from aer_megatron.rollout.checksum import tensor_checksum
from aer_megatron.sglang.checksum_queue import ChecksumQueue


def random_tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def independent_checksum(tensor: torch.Tensor) -> int:
    """The documented formula with Python integers, for tensors of at most one block."""
    import zlib

    mask, chain, mix = (1 << 64) - 1, 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9

    def key(i: int) -> int:
        value = (i + 1) * chain & mask
        value = (value ^ value >> 30) * mix & mask
        return (value ^ value >> 31) | 1

    def block(data: bytes) -> int:
        total = 0
        for i in range(len(data) // 8):
            word = int.from_bytes(data[8 * i : 8 * i + 8], "little") + key(i) & mask
            word = (word ^ word >> 32) * mix & mask
            total += (word ^ word >> 29) * key(i)
        return total & mask

    data = bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())
    header = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    state = zlib.crc32(header) * chain + len(header)
    whole = len(data) // 8 * 8
    if whole:
        state = state * chain + block(data[:whole])
    return (state * chain + block(data[whole:].ljust(8, b"\0"))) & mask


@pytest.mark.parametrize("shape", [(), (1,), (3,), (4, 5), (7, 3, 2), (0,), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_it_is_the_documented_formula(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = random_tensor(*shape).mul(3).to(dtype)
    assert tensor_checksum(tensor) == independent_checksum(tensor)


def test_every_single_bit_flip_is_detected() -> None:
    tensor = random_tensor(13)
    bits = tensor.view(torch.int32)
    seen = {tensor_checksum(tensor)}
    for element in range(13):
        for bit in range(32):
            flip = -(1 << 31) if bit == 31 else 1 << bit
            bits[element] ^= flip
            seen.add(tensor_checksum(tensor))
            bits[element] ^= flip
    assert len(seen) == 13 * 32 + 1


def test_two_sign_flips_do_not_cancel() -> None:
    tensor = random_tensor(1000)
    flipped = tensor.clone()
    flipped[[1, 501]] *= -1
    assert tensor_checksum(flipped) != tensor_checksum(tensor)


def test_nan_payloads_and_signed_zeros_differ() -> None:
    nan = torch.full((4,), float("nan"))
    other = nan.clone()
    other.view(torch.int32)[2] ^= 1
    assert torch.isnan(other).all()
    assert tensor_checksum(other) != tensor_checksum(nan)
    assert tensor_checksum(torch.tensor([0.0])) != tensor_checksum(torch.tensor([-0.0]))


@pytest.mark.parametrize("count", [10, 70_000, 300_000])  # within one block, across two, across three
def test_swapped_elements_and_swapped_blocks_are_detected(count: int) -> None:
    tensor = random_tensor(count)
    swapped = tensor.clone()
    swapped[0], swapped[-1] = tensor[-1], tensor[0]
    assert tensor_checksum(swapped) != tensor_checksum(tensor)
    assert tensor_checksum(tensor.roll(count // 2)) != tensor_checksum(tensor)
    block = 1 << 17  # fp32 elements of a block of 2^16 words
    if count > 2 * block:
        exchanged = torch.cat([tensor[block : 2 * block], tensor[:block], tensor[2 * block :]])
        assert tensor_checksum(exchanged) != tensor_checksum(tensor)


def test_shape_and_dtype_count() -> None:
    tensor = torch.zeros(4, 6)
    variants = [tensor, tensor.reshape(6, 4), tensor.reshape(24), tensor.int(), tensor.reshape(2, 12)]
    assert len({tensor_checksum(variant) for variant in variants}) == len(variants)


def test_strides_storage_and_gradients_do_not_count() -> None:
    tensor = random_tensor(9, 7)
    wide = torch.zeros(9, 8)
    wide[:, 1:] = tensor
    expected = tensor_checksum(tensor)
    assert tensor_checksum(wide[:, 1:]) == expected
    assert tensor_checksum(tensor.t().contiguous().t()) == expected
    assert tensor_checksum(torch.nn.Parameter(tensor)) == expected


def test_a_meter_sees_the_whole_stream_in_order_and_says_what_went_wrong() -> None:
    tensors = [(f"t{number}", torch.full((8,), float(number))) for number in range(50)]
    seen: list[str] = []
    with ChecksumQueue(lambda name, tensor: seen.append(name), max_bytes=64) as meter:  # two tensors
        for number, (name, _) in enumerate(meter.stream(iter(tensors))):
            assert name == f"t{number}"
            assert number + 1 - len(seen) <= 4, "more tensors are held than may be"
        meter.finish()
    assert seen == [name for name, _ in tensors]
    with ChecksumQueue(lambda name, tensor: seen.append(name), max_bytes=10**6) as meter:
        seen.clear()
        assert len(list(meter.stream(iter(tensors)))) == 50
        assert not seen, "a checksum was computed while the transfer had the cores"
        meter.finish()
    assert len(seen) == 50

    def refuse(name: str, tensor: torch.Tensor) -> None:
        if name == "t7":
            raise ValueError("t7 is wrong")

    for max_bytes in (64, 10**6):  # found while the stream runs, and at its end
        with ChecksumQueue(refuse, max_bytes=max_bytes) as meter, pytest.raises(ValueError, match="t7 is wrong"):
            list(meter.stream(iter(tensors)))
            meter.finish()

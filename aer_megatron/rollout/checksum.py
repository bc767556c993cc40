"""A 64-bit checksum of a tensor, for comparing what was sent with what arrived. Not cryptographic.

Every 64-bit word goes through a bijection that depends on its position in its block, the results are summed
modulo 2^64, and the block sums are chained in order. So a change confined to one word (any single bit flip)
is always detected, and any other change is missed with probability about 2^-64.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor

from aer_megatron.types import UInt64Array

_MASK = (1 << 64) - 1
_CHAIN = 0x9E3779B97F4A7C15
_MIX = np.uint64(0xBF58476D1CE4E5B9)
_BLOCK_WORDS = 1 << 16  # 512 KiB: block, key and temporary stay in a core's L2 cache


def tensor_checksum(tensor: Tensor) -> int:
    """Returns an unsigned 64-bit checksum of the raw bytes, the shape and the dtype of ``tensor``.

    Equal values with other bits (0.0 and -0.0, two NaNs) have different checksums; strides and device do not
    matter. A tensor on another device is copied to the host.
    """
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy()
    header = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    state = (zlib.crc32(header) * _CHAIN + len(header)) & _MASK
    whole = raw.size // 8 * 8
    words = raw[:whole].view(np.uint64)
    key = _keys(min(words.size, _BLOCK_WORDS) or 1)
    buffers = np.empty_like(key), np.empty_like(key)
    for start in range(0, words.size, _BLOCK_WORDS):
        state = (state * _CHAIN + _block_sum(words[start : start + _BLOCK_WORDS], key, buffers)) & _MASK
    tail = np.zeros(8, dtype=np.uint8)
    tail[: raw.size - whole] = raw[whole:]
    return (state * _CHAIN + _block_sum(tail.view(np.uint64), key, buffers)) & _MASK


def _block_sum(words: UInt64Array, key: UInt64Array, buffers: tuple[UInt64Array, UInt64Array]) -> int:
    key = key[: words.size]
    mixed, shifted = (buffer[: words.size] for buffer in buffers)
    np.add(words, key, out=mixed)
    np.right_shift(mixed, np.uint64(32), out=shifted)
    np.bitwise_xor(mixed, shifted, out=mixed)
    np.multiply(mixed, _MIX, out=mixed)
    np.right_shift(mixed, np.uint64(29), out=shifted)
    np.bitwise_xor(mixed, shifted, out=mixed)
    np.multiply(mixed, key, out=mixed)
    return int(mixed.sum(dtype=np.uint64))


def _keys(count: int) -> UInt64Array:
    """Returns ``count`` fixed odd numbers, the position-dependent part of the hash."""
    index = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_CHAIN)
    index = (index ^ (index >> np.uint64(30))) * _MIX
    return (index ^ (index >> np.uint64(31))) | np.uint64(1)

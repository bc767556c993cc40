"""Tensors one behind the other in one vector of bytes: what the transports that stream send at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Bucket:
    """Tensors, one behind the other in ``flat``, each at a multiple of its item size.

    Example: of a [2, 2] FP8 and a [3] fp32 tensor, ``flat`` is uint8[16].
    """

    names: list[str]
    dtypes: list[torch.dtype]
    shapes: list[list[int]]
    flat: Tensor

    @property
    def dtype_names(self) -> list[str]:
        """Returns the dtype's name for every tensor, as servers spell it."""
        return [str(dtype).removeprefix("torch.") for dtype in self.dtypes]


def buckets(named_tensors: Iterator[tuple[str, Tensor]], limit: int) -> Iterator[Bucket]:
    """Yields the stream, in order, in buckets of at most ``limit`` bytes, or of one larger tensor.

    Receivers put tensors together without gaps, so one that would lie unaligned begins a bucket. A bucket is valid
    until the one after the next is asked for: two vectors take turns, because fresh memory costs more than the copy
    into it.
    """
    vectors: list[Tensor | None] = [None, None]
    held: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in named_tensors:
        if held and (size + tensor.nbytes > limit or size % tensor.itemsize):
            yield _flatten(held, size, limit, vectors)
            held, size = [], 0
        held.append((name, tensor.detach()))
        size += tensor.nbytes
    if held:
        yield _flatten(held, size, limit, vectors)


def _flatten(held: list[tuple[str, Tensor]], size: int, limit: int, vectors: list[Tensor | None]) -> Bucket:
    raw = [tensor.contiguous().reshape(-1).view(torch.uint8) for _, tensor in held]
    if len(raw) == 1:
        flat = raw[0]  # one tensor is its own vector: the receivers only read it
    else:
        vectors.reverse()
        whole = vectors[0] = raw[0].new_empty(limit) if vectors[0] is None else vectors[0]
        flat = torch.cat(raw, out=whole[:size])
    return Bucket(
        names=[name for name, _ in held],
        dtypes=[tensor.dtype for _, tensor in held],
        shapes=[list(tensor.shape) for _, tensor in held],
        flat=flat,
    )

"""Moves small host-side arrays between all ranks: gathers ragged arrays, adds vectors.

Everything here works on WORLD: a rollout batch's token ids are megabytes, so every rank holds the whole batch and no
rank is special. No pickles: arrays travel as their bytes' own dtype.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from aer_megatron.parallel.collectives import all_gather_flat


def all_gather_ragged(array: NDArray[Any], *, device: torch.device) -> list[NDArray[Any]]:
    """Returns every rank's one-dimensional array, in rank order; lengths may differ, dtypes may not.

    Two collectives: the lengths, then the padded bytes.
    """
    world_size = dist.get_world_size()
    if world_size == 1:
        return [array]
    raw = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
    length = torch.tensor([raw.size], dtype=torch.int64, device=device)
    lengths = torch.empty(world_size, dtype=torch.int64, device=device)
    all_gather_flat(lengths, length)
    sizes = lengths.tolist()
    padded = torch.zeros(max(max(sizes), 1), dtype=torch.uint8, device=device)
    padded[: raw.size] = torch.from_numpy(raw.copy()).to(device)
    gathered = torch.empty(world_size * padded.numel(), dtype=torch.uint8, device=device)
    all_gather_flat(gathered, padded)
    rows = gathered.cpu().numpy().reshape(world_size, -1)
    return [rows[r, : sizes[r]].copy().view(array.dtype) for r in range(world_size)]


def all_sum(values: NDArray[np.float64], *, device: torch.device) -> NDArray[np.float64]:
    """Returns the element-wise sum over all ranks, bitwise identical on each (the terms are added in rank order)."""
    if dist.get_world_size() == 1:
        return values
    mine = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64).reshape(-1)).to(device)
    gathered = torch.empty(dist.get_world_size() * mine.numel(), dtype=torch.float64, device=device)
    all_gather_flat(gathered, mine)
    rows = gathered.cpu().numpy().reshape(dist.get_world_size(), -1)
    total = np.zeros_like(rows[0])
    for row in rows:
        total += row
    return total.reshape(values.shape)


def all_sum_disjoint(tensor: torch.Tensor) -> torch.Tensor:
    """Returns ``tensor`` (in place) added over all ranks, where each element is nonzero on at most one rank.

    Adding zeros is exact, so the result is each writer's value, bit for bit, on every rank.
    """
    if dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def barrier() -> None:
    """Returns when every rank has arrived."""
    if dist.get_world_size() > 1:
        dist.barrier()

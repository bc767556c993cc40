"""Moves small host-side arrays between all ranks: gathers ragged arrays, adds vectors.

Everything here works on WORLD: a rollout batch's token ids are megabytes, so every rank holds the whole batch and no
rank is special. No pickles: arrays travel as their bytes' own dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from aer_megatron.parallel.collectives import all_gather_flat


def all_gather_arrays(arrays: Sequence[NDArray[Any]], *, device: torch.device) -> list[list[NDArray[Any]]]:
    """Returns [rank][i]: every rank's one-dimensional arrays; lengths may differ between ranks, dtypes may not.

    Two collectives however many arrays there are: a header of fixed size (the bytes of each array), then all bytes of
    a rank in one tensor.
    """
    world_size = dist.get_world_size()
    if world_size == 1:
        return [list(arrays)]
    raws = [np.ascontiguousarray(array).view(np.uint8).reshape(-1) for array in arrays]
    header = torch.tensor([raw.size for raw in raws], dtype=torch.int64, device=device)
    headers = torch.empty(world_size * len(raws), dtype=torch.int64, device=device)
    all_gather_flat(headers, header)
    sizes = headers.cpu().numpy().reshape(world_size, -1)
    longest = max(int(sizes.sum(axis=1).max()), 1)
    padded = np.zeros(longest, dtype=np.uint8)
    padded[: int(header.sum())] = np.concatenate(raws)
    gathered = torch.empty(world_size * longest, dtype=torch.uint8, device=device)
    all_gather_flat(gathered, torch.from_numpy(padded).to(device))
    rows = gathered.cpu().numpy().reshape(world_size, longest)
    cuts = sizes.cumsum(axis=1)
    return [
        [
            rows[rank, end - size : end].copy().view(array.dtype)
            for array, size, end in zip(arrays, sizes[rank].tolist(), cuts[rank].tolist(), strict=True)
        ]
        for rank in range(world_size)
    ]


def all_gather_ragged(array: NDArray[Any], *, device: torch.device) -> list[NDArray[Any]]:
    """Returns every rank's one-dimensional array, in rank order; lengths may differ, dtypes may not."""
    return [rows[0] for rows in all_gather_arrays([array], device=device)]


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


def all_max(value: int, *, device: torch.device) -> int:
    """Returns the largest of all ranks' values."""
    if dist.get_world_size() == 1:
        return value
    largest = torch.tensor(value, dtype=torch.int64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def all_sum_disjoint(tensor: torch.Tensor) -> torch.Tensor:
    """Returns ``tensor`` (in place) added over all ranks, where each element is nonzero on at most one rank.

    Adding zeros is exact, so the result is each writer's value, bit for bit, on every rank.
    """
    if dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_sum_within(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Returns ``tensor`` itself, added in place over the ranks of ``group``; None: this rank alone."""
    if group is not None:
        dist.all_reduce(tensor, group=group)
    return tensor


def barrier() -> None:
    """Waits until every rank has arrived."""
    if dist.get_world_size() > 1:
        dist.barrier()

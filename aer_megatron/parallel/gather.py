"""Makes one global Experience out of every rank's share of a rollout batch."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from aer_megatron.algo.experience import join_experiences, pack_groups
from aer_megatron.parallel.exchange import all_gather_ragged
from aer_megatron.types import Experience, ScoredGroup


def gather_experience(groups: list[ScoredGroup], *, device: torch.device) -> Experience:
    """Returns the groups of all ranks in rank order as one Experience, identical on every rank.

    Groups are numbered in that order, so contiguous shares keep the order of the prompts.
    """
    mine = pack_groups(groups)
    columns = {
        field.name: all_gather_ragged(_as_bytes_view(getattr(mine, field.name)), device=device)
        for field in dataclasses.fields(Experience)
    }
    dtypes = {field.name: getattr(mine, field.name).dtype for field in dataclasses.fields(Experience)}
    num_ranks = len(columns["reward_B"])
    parts = [
        Experience(**{name: rows[rank].view(dtypes[name]) for name, rows in columns.items()})
        for rank in range(num_ranks)
    ]
    return join_experiences(parts)


def gather_counts(counts: dict[str, int], *, device: torch.device) -> dict[str, int]:
    """Returns label counts added over all ranks; ranks may have seen different labels."""
    labels = np.frombuffer("\n".join(sorted(counts)).encode(), dtype=np.uint8)
    numbers = np.array([counts[label] for label in sorted(counts)], dtype=np.int64)
    total: dict[str, int] = {}
    all_labels = all_gather_ragged(labels, device=device)
    for raw, row in zip(all_labels, all_gather_ragged(numbers, device=device), strict=True):
        for label, number in zip(raw.tobytes().decode().split("\n"), row.tolist(), strict=True) if row.size else ():
            total[label] = total.get(label, 0) + number
    return dict(sorted(total.items()))


def _as_bytes_view(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint8)

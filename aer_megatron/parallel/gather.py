"""Makes one global batch out of every rank's share of a rollout batch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from aer_megatron.algo.experience import join_experiences, pack_groups
from aer_megatron.parallel.exchange import all_gather_arrays
from aer_megatron.types import Experience, ScoredGroup


def gather_batch(
    groups: Sequence[ScoredGroup], counts: Mapping[str, int], *, device: torch.device
) -> tuple[Experience, dict[str, int]]:
    """Returns the groups of all ranks in rank order as one Experience, and label counts added over all ranks.

    Both are identical on every rank: one exchange is the step's whole way of a batch to the ranks of all parallel axes.
    Groups are numbered in rank order, so contiguous shares keep the order of the prompts. Ranks may have seen different
    labels.
    """
    mine = pack_groups(groups)
    names = [field.name for field in dataclasses.fields(Experience) if field.name != "sampled_L"]
    # an empty array stands for None: other ranks may have one, and all send as many arrays
    mask_L = np.zeros(0, dtype=np.bool_) if mine.sampled_L is None else mine.sampled_L
    labels = np.frombuffer(json.dumps(dict(counts)).encode(), dtype=np.uint8)
    of_ranks = all_gather_arrays([*(getattr(mine, name) for name in names), mask_L, labels], device=device)
    parts = [
        Experience(**dict(zip(names, arrays, strict=True)), sampled_L=mask_L if mask_L.size else None)
        for *arrays, mask_L, _ in of_ranks
    ]
    total: dict[str, int] = {}
    for *_, raw in of_ranks:
        for label, number in json.loads(raw.tobytes()).items():
            total[label] = total.get(label, 0) + number
    return join_experiences(parts), dict(sorted(total.items()))


def gather_experience(groups: Sequence[ScoredGroup], *, device: torch.device) -> Experience:
    """Returns the groups of all ranks in rank order as one Experience, identical on every rank."""
    return gather_batch(groups, {}, device=device)[0]

"""A step's batch reaches every rank in one flat exchange: a header of fixed size, one payload, no pickles."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from aer_megatron.algo.experience import join_experiences, pack_groups
from aer_megatron.parallel import exchange
from aer_megatron.parallel.gather import gather_batch
from aer_megatron.types import Completion, Experience, Prompt, RolloutGroup, ScoredGroup, Verdict, VersionSpan
from tests.support.spawn import run_distributed

FORBIDDEN = ("all_reduce", "broadcast", "all_gather", "all_gather_object", "broadcast_object_list", "gather_object")
CPU = torch.device("cpu")


def _groups(rank: int, *, tool: bool) -> list[ScoredGroup]:
    """Ragged groups: rank 0 has two prompts, rank 1 one, rank 2 none; a tool speaks first in all answers of rank 1."""
    rng = np.random.default_rng(rank)
    groups = []
    for index in range(2 - rank):
        prompt = Prompt(100 * rank + index, "p", tuple(rng.integers(0, 50, 2 + rank + index).tolist()), "a", "math")
        answers = [tuple(rng.integers(0, 50, 1 + sample + rank).tolist()) for sample in range(3)]
        first = int(tool and rank == 1)
        completions = tuple(
            Completion(ids, (-0.5,) * (len(ids) - first), "length", (VersionSpan(rank, first, len(ids)),))
            for ids in answers
        )
        groups.append(ScoredGroup(RolloutGroup(prompt, completions), (Verdict(1.0, "ok"),) * 3))
    return groups


def _counts(rank: int) -> dict[str, int]:
    return [{"ok": 4, "a\nb": 2}, {"timeout": 3, "": 1, "\ud800": 1}, {}][rank]


def _gather(rank: int, world_size: int) -> tuple[Any, Any, dict[str, int], list[int]]:
    calls: list[int] = []

    def counted(out: torch.Tensor, own: torch.Tensor, **options: Any) -> None:
        calls.append(own.numel() * own.element_size())
        flat(out, own, **options)

    def refused(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("another way for the batch")

    flat = exchange.all_gather_flat
    patches = [mock.patch.object(dist, name, refused) for name in FORBIDDEN]
    patches += [mock.patch.object(exchange, "all_gather_flat", counted), mock.patch.object(pickle, "dumps", refused)]
    for patch in patches:
        patch.start()
    try:
        experience, counts = gather_batch(_groups(rank, tool=False), _counts(rank), device=CPU)
        with_tool, _ = gather_batch(_groups(rank, tool=True), {}, device=CPU)
    finally:
        for patch in reversed(patches):
            patch.stop()
    return experience, with_tool, counts, calls


def test_three_uneven_ranks_get_one_batch_in_one_exchange() -> None:
    wanted = [join_experiences([pack_groups(_groups(rank, tool=tool)) for rank in range(3)]) for tool in (False, True)]
    assert wanted[0].sampled_L is None and wanted[1].sampled_L is not None
    num_arrays = len(dataclasses.fields(Experience)) + 1
    for *found, counts, calls in run_distributed(_gather, 3, timeout_s=300):
        for mine, theirs in zip(found, wanted, strict=True):
            for name in [field.name for field in dataclasses.fields(Experience)]:
                one, other = getattr(mine, name), getattr(theirs, name)
                assert one is other is None or (one.dtype == other.dtype and np.array_equal(one, other)), name
        assert counts == {"a\nb": 2, "ok": 4, "timeout": 3, "": 1, "\ud800": 1}
        assert len(calls) == 4
        assert calls[0] == 8 * num_arrays

"""Attention over context-parallel ranks equals attention of one rank, forward and backward; so does the cut itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams

from aer_megatron.actor.attention import ExactAttention
from aer_megatron.actor.packing import context_positions
from tests.support.spawn import run_distributed

LENGTHS = {2: [8, 8, 4, 12], 4: [8, 16, 16]}


def _attention(size: int) -> ExactAttention:
    config = SimpleNamespace(
        attention_dropout=0.0, softmax_type="vanilla", window_size=None, context_parallel_size=size
    )
    return ExactAttention(config, 1, None, "self", pg_collection=SimpleNamespace(cp=dist.group.WORLD))  # type: ignore[arg-type]


def _packed(lengths: list[int]) -> PackedSeqParams:
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends)


def _tensors(lengths: list[int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(sum(lengths), heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2, 32)]


def _share(rank: int, world_size: int) -> dict[str, Any]:
    lengths = LENGTHS[world_size]
    mine = torch.from_numpy(context_positions(np.array(lengths), cp_rank=rank, cp_size=world_size))
    *given, weight = _tensors(lengths)
    local = [x[mine].requires_grad_() for x in given]
    out = _attention(world_size)(*local, packed_seq_params=_packed(lengths))
    grads = torch.autograd.grad((out * weight[mine, :, 0]).sum(), local)
    # one sequence, padded form: [S, b = 1, ...]
    one = torch.from_numpy(context_positions(np.array(lengths[:1]), cp_rank=rank, cp_size=world_size))
    padded = _attention(world_size)(*(x[one][:, None] for x in given))[:, 0]
    return {"positions": mine, "out": out.detach(), "grads": grads, "one": one, "padded": padded}


@pytest.mark.parametrize("world_size", [2, 4])
def test_shares_are_parts_of_the_whole(world_size: int) -> None:
    lengths = LENGTHS[world_size]
    *given, weight = _tensors(lengths)
    whole = [x.requires_grad_() for x in given]
    wanted = _attention(1)(*whole, packed_seq_params=_packed(lengths))
    wanted_grads = torch.autograd.grad((wanted * weight[:, :, 0]).sum(), whole)
    seen = []
    for share in run_distributed(_share, world_size, timeout_s=300):
        rows = share["positions"]
        seen += rows.tolist()
        assert torch.allclose(share["out"], wanted[rows], atol=1e-12)
        for mine, theirs in zip(share["grads"], wanted_grads, strict=True):
            assert torch.allclose(mine, theirs[rows], atol=1e-12)
        assert torch.allclose(share["padded"], wanted[share["one"]], atol=1e-12)
    assert sorted(seen) == list(range(sum(lengths)))


def test_lengths_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(ValueError, match=r"multiples of 2 \* cp = 4"):
        context_positions(np.array([8, 6]), cp_rank=0, cp_size=2)

"""The helper that runs a function on several gloo ranks: results, and every way to fail."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.support.spawn import run_distributed

pytestmark = pytest.mark.processes


def _sum_of_ranks(rank: int, world_size: int, factor: float) -> tuple[int, int, float]:
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    return rank, world_size, float(total) * factor


def _one_fails(rank: int, world_size: int) -> None:
    if rank == 1:
        raise KeyError("boom")
    dist.barrier()


def _one_dies(rank: int, world_size: int) -> None:
    if rank == 0:
        os._exit(7)
    dist.barrier()


def _never_ends(rank: int, world_size: int) -> None:
    time.sleep(60)


def test_results_come_in_rank_order() -> None:
    assert run_distributed(_sum_of_ranks, 3, 2.0) == [(rank, 3, 12.0) for rank in range(3)]


def test_a_failing_rank_is_reported_with_its_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 of 2 failed.*_one_fails.*boom"):
        run_distributed(_one_fails, 2)


def test_a_dying_rank_is_reported_with_its_exit_code() -> None:
    with pytest.raises(RuntimeError, match="rank 0 died, exit code 7"):
        run_distributed(_one_dies, 2)


def test_a_late_rank_is_named_and_ended() -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[0\] of 1 gave no result within 1 s"):
        run_distributed(_never_ends, 1, timeout_s=1)

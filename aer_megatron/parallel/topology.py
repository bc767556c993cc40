"""Ranks and axis-named process groups of a run, through Megatron-Core's parallel_state.

``tp_group=None`` means "the tensor is whole"; a group is only handed on where its axis has more than one rank.
This file does NOT move data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel


@dataclass(frozen=True, slots=True)
class Topology:
    """Sizes and this process's coordinates. Example: rank 1 of TP=2: ``Topology(1, 2, tp=2, pp=1, dp=1, ...)``."""

    rank: int
    world_size: int
    tp: int
    pp: int
    dp: int
    tp_rank: int
    pp_rank: int
    dp_rank: int
    ep: int = 1  # expert parallelism divides the data-parallel ranks among the experts
    ep_rank: int = 0

    @property
    def ep_group(self) -> dist.ProcessGroup | None:
        return parallel_state.get_expert_model_parallel_group() if self.ep > 1 else None

    @property
    def tp_group(self) -> dist.ProcessGroup | None:
        return parallel_state.get_tensor_model_parallel_group() if self.tp > 1 else None

    @property
    def pp_group(self) -> dist.ProcessGroup | None:
        return parallel_state.get_pipeline_model_parallel_group() if self.pp > 1 else None

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp - 1

    @property
    def writes_results(self) -> bool:
        """True on the one rank of each data-parallel replica that speaks for it."""
        return self.is_last_stage and self.tp_rank == 0


def initialize_topology(*, tp: int, pp: int, seed: int, ep: int = 1, timeout_s: float = 1800.0) -> Topology:
    """Returns the topology after building Megatron's groups and its random-number tracker.

    ``timeout_s`` is the groups' own limit for one collective, the second line behind the watchdog.

    The default process group must exist; its size must be a multiple of ``tp * pp * ep`` (config.check_world_size says
    so in the user's words).
    """
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            expert_model_parallel_size=ep,
            distributed_timeout_minutes=math.ceil(timeout_s / 60.0),
        )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return Topology(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp=tp,
        pp=pp,
        dp=parallel_state.get_data_parallel_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        ep=ep,
        ep_rank=parallel_state.get_expert_model_parallel_rank() if ep > 1 else 0,
    )


def destroy_topology() -> None:
    """Leaves Megatron's groups and the default process group."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()

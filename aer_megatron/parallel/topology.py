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
    ep: int = 1  # expert parallelism divides the dp * cp ranks among the experts
    ep_rank: int = 0
    cp: int = 1  # context parallelism cuts every sequence over ranks
    cp_rank: int = 0
    vpp: int = 1  # model chunks per pipeline rank

    @property
    def num_replicas(self) -> int:
        """Ranks that hold the same weights (experts apart) and share their optimizer's state: dp x cp."""
        return self.dp * self.cp

    @property
    def replica_rank(self) -> int:
        """This process's place among ``num_replicas``, context-parallel neighbours side by side."""
        return self.dp_rank * self.cp + self.cp_rank

    @property
    def ep_group(self) -> dist.ProcessGroup | None:
        return parallel_state.get_expert_model_parallel_group() if self.ep > 1 else None

    @property
    def cp_group(self) -> dist.ProcessGroup | None:
        return parallel_state.get_context_parallel_group() if self.cp > 1 else None

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
        """True on the ranks that speak for a data-parallel replica: each context-parallel one for its own tokens."""
        return self.is_last_stage and self.tp_rank == 0


def initialize_topology(
    *, tp: int, pp: int, seed: int, ep: int = 1, cp: int = 1, vpp: int = 1, timeout_s: float = 1800.0
) -> Topology:
    """Returns the topology after building Megatron's groups and its random-number tracker.

    ``timeout_s`` is the groups' own limit for one collective, the second line behind the watchdog.

    The default process group must exist; its size must be a multiple of ``tp * pp * cp``, and what is left of ``ep``
    (config.check_world_size says so in the user's words).
    """
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
            context_parallel_size=cp,
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
        cp=cp,
        cp_rank=parallel_state.get_context_parallel_rank(),
        vpp=vpp,
    )


def leave_layout() -> None:
    """Leaves Megatron's groups, so that another layout can follow; the default process group stays.

    Megatron forgets most of its groups without destroying them; each would keep its threads and sockets.
    """
    for group in parallel_state._global_process_group_list or ():
        if group is not None:  # None is the default group
            dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()


def destroy_topology() -> None:
    """Leaves Megatron's groups and the default process group."""
    leave_layout()
    if dist.is_initialized():
        dist.destroy_process_group()

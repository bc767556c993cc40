"""Context parallelism's collective: the tokens of every rank, with gradients that flow back to their owner.

Which tokens a rank holds is actor/packing.py's (`context_positions`). Shape suffix: R context-parallel ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from aer_megatron.parallel.collectives import all_gather_flat, reduce_scatter_flat


def gather_context(local: Tensor, cp_group: dist.ProcessGroup) -> Tensor:
    """Returns [R, *local.shape], every rank's tensor; the gradient of all ranks' copies flows back to its owner."""
    result: Tensor = _GatherContext.apply(local, cp_group)  # type: ignore[no-untyped-call]
    return result


class _GatherContext(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, cp_group: dist.ProcessGroup) -> Tensor:
        ctx.cp_group = cp_group
        whole = local.new_empty(dist.get_world_size(cp_group) * local.shape[0], *local.shape[1:])
        all_gather_flat(whole, local.contiguous(), group=cp_group)
        return whole.view(-1, *local.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        own = grads[0].new_empty(grads[0].shape[1:])
        reduce_scatter_flat(own, grads[0].contiguous().flatten(0, 1), group=ctx.cp_group)
        return own, None

"""Loads Hugging Face weights into the sharded policy and streams them back out in Hugging Face names.

The collectives of the gather live here; names and layouts live in convert/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from aer_megatron.actor.model import PolicyModel, global_name
from aer_megatron.convert.architecture import ModelArchitecture
from aer_megatron.convert.mapping import hf_to_shard, megatron_names, shards_to_hf, tp_axis
from aer_megatron.parallel.topology import Topology


def load_hf_weights(
    model: PolicyModel, arch: ModelArchitecture, topology: Topology, get: Callable[[str], Tensor]
) -> None:
    """Copies this rank's shard of every parameter from Hugging Face tensors; ``get(name)`` returns one of them.

    Raises:
        KeyError / ValueError: from ``get`` or the mapping, naming the tensor that is missing or mis-shaped.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            whole_name = global_name(model, name)
            shard = hf_to_shard(
                arch, whole_name, get, tp_rank=topology.tp_rank, tp_size=topology.tp, padded_vocab=model.vocab_size
            )
            if shard.shape != parameter.shape:
                raise ValueError(
                    f"{whole_name}: the checkpoint gives {tuple(shard.shape)}, the model has {tuple(parameter.shape)}"
                )
            parameter.copy_(shard)


def iter_hf_weights(
    model: PolicyModel, arch: ModelArchitecture, topology: Topology
) -> Iterator[tuple[str, Tensor]]:
    """Yields (Hugging Face name, whole tensor) of the policy, on every rank, one Megatron parameter at a time.

    Each parameter is gathered over the tensor-parallel ranks of the stage that owns it and then broadcast from that
    stage, so that no rank holds more than one whole parameter beside its own shard.
    """
    parameters = {global_name(model, name): parameter for name, parameter in model.named_parameters()}
    for owner in range(topology.pp):
        for name in _stage_names(model, arch, topology, owner):
            if owner > 0 and arch.tied_embeddings and name.startswith("output_layer"):
                continue  # the last stage's copy of the tied embedding
            shards = None
            if owner == topology.pp_rank:
                shards = _gather_shards(parameters[name], topology, split=tp_axis(arch, name) is not None)
            if topology.pp > 1:
                shards = _broadcast_shards(shards, owner, topology)
            assert shards is not None
            yield from shards_to_hf(arch, name, shards)


def _stage_names(model: PolicyModel, arch: ModelArchitecture, topology: Topology, stage: int) -> list[str]:
    per_stage = arch.num_layers // topology.pp
    names = megatron_names(
        arch,
        range(stage * per_stage, (stage + 1) * per_stage),
        first_stage=stage == 0,
        last_stage=stage == topology.pp - 1,
        te_spec=any("layer_norm_weight" in name for name, _ in model.named_parameters()),
    )
    return names


def _gather_shards(parameter: Tensor, topology: Topology, *, split: bool) -> list[Tensor]:
    mine = parameter.detach()
    if topology.tp == 1 or not split:
        return [mine]
    shards = [torch.empty_like(mine) for _ in range(topology.tp)]
    dist.all_gather(shards, mine.contiguous(), group=topology.tp_group)
    return shards


def _broadcast_shards(shards: list[Tensor] | None, owner: int, topology: Topology) -> list[Tensor]:
    group = topology.pp_group
    assert group is not None
    source = dist.get_global_rank(group, owner)
    header: list[object] = [[(tuple(s.shape), s.dtype) for s in shards] if shards is not None else None]
    dist.broadcast_object_list(header, src=source, group=group)
    layout = header[0]
    assert isinstance(layout, list)
    if shards is None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
        shards = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in layout]
    whole = [shard.contiguous() for shard in shards]
    for shard in whole:
        dist.broadcast(shard, src=source, group=group)
    return whole

"""Loads Hugging Face weights into the sharded policy and streams them back out in Hugging Face names.

    shards --pack--> flat bucket --all-gather tp, ep--> --broadcast pp--> whole shards --shards_to_hf--> HF tensors

Buckets are bounded, so a rank holds its own shard of the model and one bucket; a bucket costs one collective per
parallel axis however many tensors are in it. Every rank derives the buckets from the architecture alone, so nobody
has to be told what arrives. The collectives of the gather live here; names and layouts live in convert/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from aer_megatron.actor.model import named_weights
from aer_megatron.convert.architecture import ModelArchitecture
from aer_megatron.convert.mapping import (
    find_row,
    hf_to_shard,
    is_expert,
    megatron_names,
    renumber_expert,
    shard_shape,
    shards_to_hf,
)
from aer_megatron.parallel.collectives import all_gather_flat
from aer_megatron.parallel.topology import Topology


@dataclass(frozen=True, slots=True)
class Bucket:
    """Parameters that travel together: those of one pipeline stage and either all experts' or nobody's.

    An expert parameter stands for its namesakes on all expert-parallel ranks; its name is rank 0's.
    """

    stage: int
    experts: bool
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def num_elements(self) -> int:
        """Elements of one rank's shards."""
        return sum(torch.Size(shape).numel() for shape in self.shapes)


Model: TypeAlias = GPTModel | Sequence[GPTModel]  # a model, or the chunks of an interleaved pipeline's rank


def load_hf_weights(model: Model, arch: ModelArchitecture, topology: Topology, get: Callable[[str], Tensor]) -> None:
    """Copies this rank's shard of every parameter from Hugging Face tensors; ``get(name)`` returns one of them.

    Raises:
        KeyError / ValueError: from ``get`` or the mapping, naming the tensor that is missing or mis-shaped.
    """
    with torch.no_grad():
        for whole_name, parameter in named_weights(model):
            shard = hf_to_shard(
                arch, whole_name, get, tp_rank=topology.tp_rank, tp_size=topology.tp, padded_vocab=_padded_vocab(model)
            )
            if shard.shape != parameter.shape:
                raise ValueError(
                    f"{whole_name}: the checkpoint gives {tuple(shard.shape)}, the model has {tuple(parameter.shape)}"
                )
            parameter.copy_(shard)


def iter_hf_weights(
    model: Model, arch: ModelArchitecture, topology: Topology, *, bucket_bytes: int
) -> Iterator[tuple[str, Tensor]]:
    """Yields (Hugging Face name, whole tensor) of the policy, on every rank; all ranks must exhaust it together.

    A bucket holds at most ``bucket_bytes`` of whole tensors (one larger tensor travels alone). A tensor stays valid for
    as long as it is held and costs its bucket's memory until all of that bucket's are dropped.

    Raises:
        ValueError: a parameter whose dtype is not the model's, which could not travel with the others.
    """
    parameters = {name: parameter.detach() for name, parameter in named_weights(model)}
    dtype = _first(model).config.params_dtype
    other = [name for name, parameter in parameters.items() if parameter.dtype != dtype]
    if other:
        raise ValueError(
            f"{other[0]} is {parameters[other[0]].dtype}, the model is {dtype}: weights cannot be streamed"
        )
    device = next(iter(parameters.values())).device
    limit = bucket_bytes // dtype.itemsize
    for bucket in weight_buckets(arch, topology, limit, _padded_vocab(model), te_spec=has_te_names(model)):
        if topology.tp == topology.pp == topology.ep == 1:
            for name in bucket.names:
                yield from shards_to_hf(arch, name, [parameters[name]])
            continue
        gathered = _gather(bucket, parameters, arch, topology, torch.empty(0, dtype=dtype, device=device))
        yield from _unpack(bucket, gathered, arch, topology)


def weight_buckets(
    arch: ModelArchitecture, topology: Topology, limit: int, padded_vocab: int, *, te_spec: bool
) -> Iterator[Bucket]:
    """Yields the buckets of a model, the same on every rank; ``limit`` bounds a gathered bucket in elements."""
    first_experts = arch.moe.num_experts // topology.ep if arch.moe else 0
    per_chunk = arch.num_layers // (topology.pp * topology.vpp)
    for stage in range(topology.pp):
        names = []
        for chunk in range(topology.vpp):  # chunk c of stage s is part c * pp + s of the model
            part = chunk * topology.pp + stage
            names += megatron_names(
                arch,
                range(part * per_chunk, (part + 1) * per_chunk),
                first_stage=part == 0,
                last_stage=part == topology.pp * topology.vpp - 1,
                te_spec=te_spec,
            )
        if stage > 0 and arch.tied_embeddings:  # the last stage's copy of the tied embedding
            names = [name for name in names if not name.startswith("output_layer")]
        for experts in (False, True):
            own = [name for name in names if is_expert(arch, name) == experts]
            if experts:  # those of expert-parallel rank 0, which stand for the others
                own = [name for name in own if find_row(arch, name)[1]["e"] < first_experts]
            shapes = [shard_shape(arch, name, tp_size=topology.tp, padded_vocab=padded_vocab) for name in own]
            copies = topology.tp * (topology.ep if experts else 1)
            yield from _split(stage, experts, own, shapes, limit // copies)


def _split(stage: int, experts: bool, names: list[str], shapes: list[tuple[int, ...]], limit: int) -> Iterator[Bucket]:
    held: list[int] = []
    size = 0
    for place, shape in enumerate(shapes):
        added = torch.Size(shape).numel()
        if held and size + added > limit:
            yield Bucket(stage, experts, tuple(names[i] for i in held), tuple(shapes[i] for i in held))
            held, size = [], 0
        held.append(place)
        size += added
    if held:
        yield Bucket(stage, experts, tuple(names[i] for i in held), tuple(shapes[i] for i in held))


def _gather(
    bucket: Bucket, parameters: Mapping[str, Tensor], arch: ModelArchitecture, topology: Topology, like: Tensor
) -> Tensor:
    """Returns [ep, tp, elements] of the bucket's stage, on every rank; ep is 1 for what is not an expert's."""
    ep = topology.ep if bucket.experts else 1
    if topology.pp_rank == bucket.stage:
        names = bucket.names
        if bucket.experts:
            names = tuple(_of_ep_rank(name, topology.ep_rank, arch, topology) for name in names)
        flat = torch.cat([parameters[name].reshape(-1) for name in names])
        if topology.tp > 1:
            flat = _gathered(flat, topology.tp, topology.tp_group)
        if ep > 1:
            flat = _gathered(flat, ep, topology.ep_group)
    else:
        flat = like.new_empty(ep * topology.tp * bucket.num_elements)
    if topology.pp > 1:
        assert topology.pp_group is not None
        dist.broadcast(flat, src=dist.get_global_rank(topology.pp_group, bucket.stage), group=topology.pp_group)
    return flat.view(ep, topology.tp, bucket.num_elements)


def _gathered(flat: Tensor, size: int, group: dist.ProcessGroup | None) -> Tensor:
    whole = flat.new_empty(size * flat.numel())
    all_gather_flat(whole, flat, group=group)
    return whole


def _unpack(
    bucket: Bucket, gathered: Tensor, arch: ModelArchitecture, topology: Topology
) -> Iterator[tuple[str, Tensor]]:
    start = 0
    for name, shape in zip(bucket.names, bucket.shapes, strict=True):
        size = torch.Size(shape).numel()
        for ep_rank, of_ranks in enumerate(gathered[:, :, start : start + size]):
            whole_name = _of_ep_rank(name, ep_rank, arch, topology) if bucket.experts else name
            yield from shards_to_hf(arch, whole_name, [shard.view(shape) for shard in of_ranks])
        start += size


def _of_ep_rank(name: str, ep_rank: int, arch: ModelArchitecture, topology: Topology) -> str:
    """The namesake on ``ep_rank`` of an expert's parameter on rank 0."""
    assert arch.moe is not None
    return renumber_expert(name, ep_rank * (arch.moe.num_experts // topology.ep))


def has_te_names(model: Model) -> bool:
    """Returns whether the layers are TransformerEngine's, which name parameters in another way."""
    return any("layer_norm_weight" in name for name, _ in named_weights(model))


def _first(model: Model) -> GPTModel:
    return model if isinstance(model, GPTModel) else model[0]


def _padded_vocab(model: Model) -> int:
    return int(_first(model).vocab_size)

"""Hugging Face tensors <-> shards of Megatron parameters, by name, through the rows of families.py.

    HF tensors --hf_to_shard(name, tp_rank)--> one rank's shard --shards_to_hf(name, all ranks')--> HF tensors

Layer and expert indices in names are global. How a parameter's numbers are arranged is its row's affair
(convert/rows.py). This file does NOT call collectives, touch files or build models.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from aer_megatron.convert.architecture import ModelArchitecture
from aer_megatron.convert.families import MODEL_FAMILIES
from aer_megatron.convert.rows import Row
from aer_megatron.convert.safetensors_writer import TensorSpec

Indices = dict[str, int]
# an expert's number under the local layer spec, and under TransformerEngine's
_LOCAL_EXPERT = re.compile(r"(\.local_experts\.)(\d+)")
_GROUPED_EXPERT = re.compile(r"(\.experts\.linear_fc[12]\.(?:weight|bias))(\d+)$")


def megatron_names(
    arch: ModelArchitecture, layers: range, first_stage: bool, last_stage: bool, te_spec: bool = False
) -> list[str]:
    """Parameter names, with global indices, of the pipeline stage that holds ``layers``.

    ``te_spec`` gives TransformerEngine's names (norms fused into linears, grouped experts). A tied last stage
    that is not also the first holds its own copy of the embedding as output_layer.weight.
    """
    experts = range(arch.moe.num_experts) if arch.moe else range(0)
    names: list[str] = []
    for row in MODEL_FAMILIES[arch.family].rows:
        template = row.te if te_spec and row.te else row.megatron
        shared = row.when_tied is not None and arch.tied_embeddings and first_stage
        here = {"layer": True, "first": first_stage, "last": last_stage and not shared}
        if here[row.stage]:
            names += [template.format(**indices) for indices in _indices(template, layers, experts)]
    return names


def hf_names(arch: ModelArchitecture) -> dict[str, tuple[int, ...]]:
    """Names and shapes of every tensor of the Hugging Face checkpoint of ``arch``."""
    whole = megatron_names(arch, range(arch.num_layers), first_stage=True, last_stage=True)
    return {name: shape for parameter in whole for name, shape in hf_tensors_of(arch, parameter).items()}


def hf_specs(arch: ModelArchitecture, dtypes: torch.dtype | Mapping[str, torch.dtype]) -> dict[str, TensorSpec]:
    """HF name -> shape and dtype of every tensor of the Hugging Face checkpoint; one dtype for all, or by name."""
    return {
        name: TensorSpec(shape, dtypes if isinstance(dtypes, torch.dtype) else dtypes[name])
        for name, shape in hf_names(arch).items()
    }


def hf_tensors_of(arch: ModelArchitecture, megatron_name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the Hugging Face tensors behind a parameter; a tied head names the embedding."""
    row, indices = find_row(arch, megatron_name)
    return {tensor.name.format(**indices): tensor.shape(arch) for tensor in row.sources(arch)}


def tp_axis(arch: ModelArchitecture, megatron_name: str) -> int | None:
    """The axis along which ranks hold different parts of a parameter; None = every rank holds all of it."""
    return find_row(arch, megatron_name)[0].tp_axis


def shard_shape(arch: ModelArchitecture, megatron_name: str, *, tp_size: int, padded_vocab: int) -> tuple[int, ...]:
    """The shape of one rank's shard of a parameter.

    Raises ValueError where tp_size does not divide it, or for a vocabulary of fewer rows than tokens.
    """
    row, _ = find_row(arch, megatron_name)
    whole = list(row.shape(arch, padded_vocab))
    if row.tp_axis is not None:
        if whole[row.tp_axis] % (tp_size * row.num_blocks):
            raise ValueError(
                f"tp={tp_size} does not divide axis {row.tp_axis} of {megatron_name} {tuple(whole)};"
                " use a size that check_parallel accepts"
            )
        whole[row.tp_axis] //= tp_size
    return tuple(whole)


def hf_to_shard(
    arch: ModelArchitecture,
    megatron_name: str,
    get: Callable[[str], Tensor],
    *,
    tp_rank: int,
    tp_size: int,
    padded_vocab: int,
) -> Tensor:
    """Rank ``tp_rank``'s shard of a parameter, contiguous; ``get`` returns the whole HF tensor of a name.

    For experts pass the rank and size of the expert-tensor-parallel group. The result may share memory with
    what ``get`` returned: copy it into the parameter. Raises ValueError for an unknown name or a tensor of
    another shape.
    """
    if not 0 <= tp_rank < tp_size:
        raise ValueError(f"tp_rank={tp_rank} must be in [0, {tp_size})")
    shape = shard_shape(arch, megatron_name, tp_size=tp_size, padded_vocab=padded_vocab)
    tensors = []
    for hf_name, hf_shape in hf_tensors_of(arch, megatron_name).items():
        tensor = get(hf_name)
        _check_shape(hf_name, tensor, hf_shape)
        tensors.append(tensor)
    return find_row(arch, megatron_name)[0].shard(arch, tensors, tp_rank, shape)


def shards_to_hf(arch: ModelArchitecture, megatron_name: str, shards: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
    """(HF name, whole tensor) pairs from all tensor-parallel ranks' shards in rank order, padding dropped.

    A parameter that is not split takes one shard or one per rank (the first is used). A tied head's copy
    gives an empty list: the embedding is its checkpoint. Results may share memory with the shards. Raises
    ValueError for an unknown name or a shard of another shape.
    """
    row, indices = find_row(arch, megatron_name)
    if not shards:
        raise ValueError(f"{megatron_name}: no shards given; pass one tensor per tensor-parallel rank")
    if row.when_tied and arch.tied_embeddings:
        return []
    rows = shards[0].shape[0] * len(shards)
    shape = shard_shape(arch, megatron_name, tp_size=len(shards), padded_vocab=rows)
    for rank, shard in enumerate(shards):
        _check_shape(f"{megatron_name} of tp rank {rank}", shard, shape)
    names = [tensor.name.format(**indices) for tensor in row.hf]
    return list(zip(names, row.whole(arch, shards), strict=True))


def check_hf_tensors(
    arch: ModelArchitecture, shapes: Mapping[str, tuple[int, ...]], get: Callable[[str], Tensor]
) -> None:
    """Returns nothing; raises ValueError naming the tensors that are missing, unexpected or of another shape.

    Tolerated: rotary inv_freq buffers of old checkpoints, and an lm_head.weight in a tied checkpoint if it
    equals the embedding (a different one means that config.json is wrong about tying).
    """
    expected = hf_names(arch)
    extra = [name for name in shapes if name not in expected and not name.endswith("rotary_emb.inv_freq")]
    for row in MODEL_FAMILIES[arch.family].rows:
        if row.when_tied and arch.tied_embeddings and row.hf[0].name in extra:
            extra.remove(row.hf[0].name)
            if not torch.equal(get(row.hf[0].name), get(row.when_tied.name)):
                raise ValueError(
                    f"{row.hf[0].name} differs from {row.when_tied.name}, yet config.json has"
                    " tie_word_embeddings=true; set it to false"
                )
    missing = [name for name in expected if name not in shapes]
    wrong = [
        f"{name} {tuple(shapes[name])} (expected {shape})"
        for name, shape in expected.items()
        if name in shapes and tuple(shapes[name]) != shape
    ]
    found = [("missing", missing), ("unexpected", extra), ("of another shape", wrong)]
    problems = [f"{len(names)} {what}: {_some(names)}" for what, names in found if names]
    if problems:
        raise ValueError(f"the checkpoint's tensors do not fit {arch.family} of config.json: " + "; ".join(problems))


def find_row(arch: ModelArchitecture, megatron_name: str) -> tuple[Row, Indices]:
    """The table row of a parameter and the indices in its name ({"i": layer, "e": expert}, where present)."""
    for row in MODEL_FAMILIES[arch.family].rows:
        for pattern in row.patterns:
            match = pattern.fullmatch(megatron_name)
            if match:
                indices = {key: int(value) for key, value in match.groupdict().items()}
                _check_range(megatron_name, indices, arch)
                return row, indices
    raise ValueError(f"{megatron_name} is not a parameter of a {arch.family} model; see convert/families.py")


def renumber_expert(megatron_name: str, first: int) -> str:
    """The name of an expert's parameter with ``first`` added to its expert number: local to global."""
    for pattern in (_LOCAL_EXPERT, _GROUPED_EXPERT):
        renamed, count = pattern.subn(lambda match: f"{match[1]}{int(match[2]) + first}", megatron_name)
        if count:
            return renamed
    raise ValueError(f"{megatron_name} is not the parameter of an expert")


def is_expert(arch: ModelArchitecture, megatron_name: str) -> bool:
    """Whether a parameter belongs to one expert."""
    return "e" in find_row(arch, megatron_name)[1]


def _check_range(megatron_name: str, indices: Indices, arch: ModelArchitecture) -> None:
    limits = {"i": arch.num_layers, "e": arch.moe.num_experts if arch.moe else 0}
    for key, value in indices.items():
        if value >= limits[key]:
            what = "layer" if key == "i" else "expert"
            raise ValueError(f"{megatron_name}: {what} {value} is out of range, the model has {limits[key]}")


def _indices(template: str, layers: range, experts: range) -> Iterator[Indices]:
    if "{i}" not in template:
        yield {}
        return
    for layer in layers:
        if "{e}" in template:
            yield from ({"i": layer, "e": expert} for expert in experts)
        else:
            yield {"i": layer}


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")


def _some(names: Sequence[str]) -> str:
    shown = 4
    return ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")

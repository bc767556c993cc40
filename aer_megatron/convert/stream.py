"""Whole models between Hugging Face names and Megatron's stored keys, one parameter at a time.

    HF tensors --write_megatron--> distributed checkpoint --iter_stored_as_hf--> HF tensors

A stored key stacks all layers (and experts) of one row of families.py. Layouts are those of one tensor-parallel
rank, so convert/mapping.py does all the work; Megatron-Core cuts the stored tensors for any layout when it loads.

This file does NOT open files or know the format on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from aer_megatron.convert.architecture import ModelArchitecture
from aer_megatron.convert.families import EXTRA_STATES, EXTRA_STATES_DENSE, EXTRA_STATES_EXPERT
from aer_megatron.convert.mapping import find_row, hf_tensors_of, hf_to_shard, megatron_names, shards_to_hf
from aer_megatron.convert.rows import Row

# What training checkpoints hold beside the model.
_NOT_MODEL = ("optimizer.", "chained_", "rng_state", "rerun_state_machine_state", "opt_param_scheduler")


class StoredReader(Protocol):
    """What is read of a distributed checkpoint; ``convert.megatron_folder.MegatronFolder`` has it."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def dtype(self, key: str) -> torch.dtype: ...

    def read(self, key: str, index: tuple[int, ...]) -> Tensor: ...


class StoredWriter(Protocol):
    """What is written to; ``convert.megatron_folder.MegatronWriter`` has it."""

    def add(self, key: str, chunk: Tensor, *, offset: Sequence[int], whole: Sequence[int]) -> None: ...

    def add_empty_object(self, key: str) -> None: ...


@dataclass(frozen=True, slots=True)
class StoredParameter:
    """Where a parameter lies in a checkpoint: its row, the stored key and the indices of the key's leading axes."""

    row: Row
    key: str
    index: tuple[int, ...]
    stack: tuple[int, ...]  # lengths of the leading axes


def all_names(arch: ModelArchitecture) -> list[str]:
    """The Megatron names of all parameters of the unsplit model."""
    return megatron_names(arch, range(arch.num_layers), first_stage=True, last_stage=True)


def write_megatron(
    arch: ModelArchitecture,
    get: Callable[[str], Tensor],
    writer: StoredWriter,
    *,
    dtype: torch.dtype | None,
    advance: Callable[[int], None],
) -> None:
    """Writes the whole model; ``get`` returns an HF tensor by name, ``advance`` is told the bytes written.

    Floating-point tensors become ``dtype``, if given. Raises ValueError as ``hf_to_shard`` does.
    """
    for name in all_names(arch):
        parameter = _parameter(arch, name)
        tensor = hf_to_shard(arch, name, get, tp_rank=0, tp_size=1, padded_vocab=arch.vocab_size)
        tensor = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
        for key in parameter.row.stored_keys:
            # gate and up apart, as Megatron writes them: a tensor-parallel rank then reads no more than it needs
            start = 0
            for block in tensor.chunk(parameter.row.num_blocks):
                offset = (*parameter.index, start, *[0] * (tensor.dim() - 1))
                writer.add(key, block, offset=offset, whole=(*parameter.stack, *tensor.shape))
                start += block.shape[0]
        advance(tensor.nbytes)
    for key in _extra_states(arch):
        writer.add_empty_object(key)


def stored_architecture(arch: ModelArchitecture, stored: StoredReader) -> ModelArchitecture:
    """``arch`` with the zero query groups that the checkpoint was padded with.

    Raises ValueError naming the keys that are missing, unexpected or of another shape.
    """
    shapes = {key: shape for key, shape in stored.shapes().items() if not key.startswith(_NOT_MODEL)}
    padded = replace(arch, num_padding_groups=_padding_groups(arch, shapes))
    missing, wrong, known = [], [], set()
    for name in all_names(padded):
        key, found = _stored_key(padded, name, shapes)
        known.update(_spellings(padded, name))
        if found is None:
            missing.append(key)
            continue
        expected = tuple(_expected_shape(padded, name, found))
        if found != expected:
            wrong.append(f"{key} {found} (expected {expected})")
    extra = [key for key in shapes if key not in known and "_extra_state" not in key]
    problems = [
        f"{len(names)} {what}: {', '.join(names[:4])}"
        for what, names in (
            ("missing", sorted(set(missing))),
            ("unexpected", extra),
            ("of another shape", sorted(set(wrong))),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"the distributed checkpoint does not fit {arch.family} of config.json: " + "; ".join(problems)
        )
    return padded


def stored_hf_dtypes(arch: ModelArchitecture, stored: StoredReader) -> dict[str, torch.dtype]:
    """HF name -> dtype in which its numbers are stored."""
    shapes = stored.shapes()
    return {
        hf_name: stored.dtype(_stored_key(arch, name, shapes)[0])
        for name in all_names(arch)
        for hf_name in hf_tensors_of(arch, name)
    }


def iter_stored_as_hf(arch: ModelArchitecture, stored: StoredReader) -> Iterator[tuple[str, Tensor]]:
    """Yields (HF name, tensor) of the whole checkpoint; ``arch`` is that of ``stored_architecture``."""
    shapes = stored.shapes()
    for name in all_names(arch):
        key, shape = _stored_key(arch, name, shapes)
        if shape is None:
            raise ValueError(f"the checkpoint holds no {key}")
        parameter = _parameter(arch, name)
        index = parameter.index if key in parameter.row.stored_keys else parameter.index[1:]
        yield from shards_to_hf(arch, name, [stored.read(key, index)])


def _parameter(arch: ModelArchitecture, name: str) -> StoredParameter:
    row, indices = find_row(arch, name)
    index = tuple(indices[axis] for axis in ("i", "e") if axis in indices)
    lengths = (arch.num_layers, arch.moe.num_experts if arch.moe else 0)
    return StoredParameter(row, row.stored_keys[0], index, lengths[: len(index)])


def _spellings(arch: ModelArchitecture, name: str) -> list[str]:
    """Every key under which a parameter may be stored: stacked, or (models of unequal layers) layer by layer."""
    parameter = _parameter(arch, name)
    if not parameter.index:
        return list(parameter.row.stored_keys)
    layer = f"decoder.layers.{parameter.index[0]}."
    return [*parameter.row.stored_keys, *(key.replace("decoder.layers.", layer) for key in parameter.row.stored_keys)]


def _stored_key(
    arch: ModelArchitecture, name: str, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[str, tuple[int, ...] | None]:
    """The key that holds a parameter and its whole shape; None = none does."""
    spellings = _spellings(arch, name)
    for key in spellings:
        if key in shapes:
            return key, shapes[key]
    return spellings[0], None


def _expected_shape(arch: ModelArchitecture, name: str, found: tuple[int, ...]) -> list[int]:
    parameter = _parameter(arch, name)
    # a vocabulary may be padded to any tensor-parallel size
    whole = parameter.row.shape(arch, padded_vocab=max([arch.vocab_size, *found[:1]]))
    by_layer = len(found) < len(whole) + len(parameter.stack)
    return [*parameter.stack[1 if by_layer else 0 :], *whole]


def _padding_groups(arch: ModelArchitecture, shapes: Mapping[str, tuple[int, ...]]) -> int:
    for name in all_names(arch):
        shape = _stored_key(arch, name, shapes)[1]
        groups = None if shape is None else find_row(arch, name)[0].padding_groups(arch, shape)
        if groups is not None:
            return groups
    return 0


def _extra_states(arch: ModelArchitecture) -> Iterator[str]:
    dense = EXTRA_STATES if arch.moe else EXTRA_STATES + EXTRA_STATES_DENSE
    layers = arch.num_layers
    for layer in range(layers):
        yield from (f"decoder.layers.{module}._extra_state/shard_{layer}_{layers}" for module in dense)
        experts = arch.moe.num_experts if arch.moe else 0
        for expert in range(experts):
            place = f"shard_{layer}.{expert}_{layers}.{experts}"
            yield from (f"decoder.layers.{module}._extra_state/{place}" for module in EXTRA_STATES_EXPERT)

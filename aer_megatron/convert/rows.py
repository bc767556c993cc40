"""Rows of the parameter tables: one Megatron-Core parameter and the Hugging Face tensors with the same numbers.

    HF tensors --shard(rank)--> one tensor-parallel rank's part --whole(all ranks')--> HF tensors

A row of class ``Row`` has the same arrangement on both sides; a subclass is one other arrangement and says what shape
the whole parameter has, how it is cut and how it is put together. The functions work on any device and keep dtype and
device. Padding (vocabulary rows, query groups) is zeros.

Placeholders in names: ``{i}`` is the layer and ``{e}`` the expert, both GLOBAL indices.

This file does NOT know which parameters a model has (convert/families.py) or call collectives.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from aer_megatron.convert.architecture import ModelArchitecture

Stage = Literal["first", "layer", "last"]


@dataclass(frozen=True)
class HFTensor:
    """One tensor of the Hugging Face checkpoint. Example: ``HFTensor("lm_head.weight", "vocab hidden")``

    dims: the names of its axes, as ``ModelArchitecture.dim`` knows them.
    """

    name: str
    dims: str

    def shape(self, arch: ModelArchitecture) -> tuple[int, ...]:
        """The whole tensor's shape."""
        return tuple(arch.dim(name) for name in self.dims.split())


@dataclass(frozen=True)
class Row:
    """A parameter that Hugging Face has in the same arrangement, as one tensor.

    tp_axis: the axis split over tensor parallelism, None = the same on every rank. te: the name under
    TransformerEngine's layer spec, where it differs. stored: the key(s) in Megatron's distributed checkpoint,
    where they do not follow from the names. when_tied: read instead when the embeddings are tied; such a row
    is then never written back.
    """

    megatron: str
    hf: tuple[HFTensor, ...]
    tp_axis: int | None = None
    stage: Stage = "layer"
    te: str | None = None
    when_tied: HFTensor | None = None
    stored: tuple[str, ...] = ()

    num_blocks: ClassVar[int] = 1  # blocks of rows that are each split over the ranks, and stored, on their own

    @property
    def stored_keys(self) -> tuple[str, ...]:
        """The keys of a distributed checkpoint, any of which holds all layers (and experts) of this row.

        Megatron-Core stacks layers along a first axis and gives both layer specs TransformerEngine's names.
        """
        return self.stored or ((self.te or self.megatron).replace("{i}.", ""),)

    @cached_property
    def patterns(self) -> tuple[re.Pattern[str], ...]:
        """The name patterns that select this row: the local spec's, then TransformerEngine's."""
        names = [self.megatron] + ([self.te] if self.te else [])
        return tuple(_pattern(name) for name in names)

    def sources(self, arch: ModelArchitecture) -> tuple[HFTensor, ...]:
        """The Hugging Face tensors to read."""
        return (self.when_tied,) if self.when_tied and arch.tied_embeddings else self.hf

    def shape(self, arch: ModelArchitecture, padded_vocab: int) -> tuple[int, ...]:
        """The whole parameter's shape, padding included."""
        del padded_vocab
        return self.hf[0].shape(arch)

    def padding_groups(self, arch: ModelArchitecture, shape: Sequence[int]) -> int | None:
        """The zero query groups of a stored parameter, by its shape; None = this row does not tell."""
        del arch, shape
        return None

    def shard(self, arch: ModelArchitecture, tensors: Sequence[Tensor], rank: int, shape: Sequence[int]) -> Tensor:
        """Rank ``rank``'s part, of ``shape`` and contiguous; it may share memory with ``tensors``."""
        del arch
        if self.tp_axis is None:
            return tensors[0].contiguous()
        return _padded_slice(tensors[0], self.tp_axis, rank, shape[self.tp_axis])

    def whole(self, arch: ModelArchitecture, shards: Sequence[Tensor]) -> list[Tensor]:
        """The tensors of ``hf`` from all ranks' parts in rank order, padding dropped."""
        joined = shards[0] if self.tp_axis is None else torch.cat(list(shards), dim=self.tp_axis)
        for axis, size in enumerate(self.hf[0].shape(arch)):
            joined = joined.narrow(axis, 0, size)
        return [joined.contiguous()]


@dataclass(frozen=True)
class VocabularyRow(Row):
    """One row per token id, padded to what tensor parallelism divides."""

    tp_axis: int | None = 0

    def shape(self, arch: ModelArchitecture, padded_vocab: int) -> tuple[int, ...]:
        if padded_vocab < arch.vocab_size:
            raise ValueError(f"{self.megatron}: {padded_vocab} rows in all, the vocabulary has {arch.vocab_size}")
        return (padded_vocab, *self.hf[0].shape(arch)[1:])


@dataclass(frozen=True)
class QKVRow(Row):
    """Query, key and value joined: rows are [groups, (its query heads, 1 key head, 1 value head), head_dim].

    Groups are padded; a rank holds an equal block of rows, whose borders need not be a group's.
    """

    tp_axis: int | None = 0

    def shape(self, arch: ModelArchitecture, padded_vocab: int) -> tuple[int, ...]:
        del padded_vocab
        return (arch.padded_kv_heads * _group_rows(arch), *self.hf[0].shape(arch)[1:])

    def padding_groups(self, arch: ModelArchitecture, shape: Sequence[int]) -> int | None:
        num_axes = len(self.hf[0].shape(arch))  # without the leading ones of layers and experts
        if len(shape) < num_axes:
            return None
        return max(0, shape[-num_axes] // _group_rows(arch) - arch.num_kv_heads)

    def shard(self, arch: ModelArchitecture, tensors: Sequence[Tensor], rank: int, shape: Sequence[int]) -> Tensor:
        group_rows, rows = _group_rows(arch), shape[0]
        start = rank * rows
        # only the groups that these rows touch are interleaved
        first, end = start // group_rows, -(-(start + rows) // group_rows)
        parts = []
        for tensor in tensors:
            grouped = tensor.view(arch.num_kv_heads, -1, *tensor.shape[1:])
            parts.append(_padded_slice(grouped[first:], 0, 0, end - first))
        interleaved = torch.cat(parts, dim=1).flatten(0, 1)
        return interleaved.narrow(0, start - first * group_rows, rows).contiguous()

    def whole(self, arch: ModelArchitecture, shards: Sequence[Tensor]) -> list[Tensor]:
        joined = torch.cat(list(shards))
        grouped = joined.view(arch.padded_kv_heads, _group_rows(arch), *joined.shape[1:])[: arch.num_kv_heads]
        sizes = [arch.heads_per_group * arch.head_dim, arch.head_dim, arch.head_dim]
        return [part.flatten(0, 1).contiguous() for part in grouped.split_with_sizes(sizes, dim=1)]


@dataclass(frozen=True)
class AttentionOutputRow(Row):
    """The output projection of attention: its columns follow the query heads, padded ones included."""

    tp_axis: int | None = 1

    def shape(self, arch: ModelArchitecture, padded_vocab: int) -> tuple[int, ...]:
        del padded_vocab
        return (self.hf[0].shape(arch)[0], arch.padded_heads * arch.head_dim)


@dataclass(frozen=True)
class GateUpRow(Row):
    """Gate and up projection in one: every rank holds [its gate rows; its up rows]."""

    tp_axis: int | None = 0
    num_blocks: ClassVar[int] = 2

    def shape(self, arch: ModelArchitecture, padded_vocab: int) -> tuple[int, ...]:
        del padded_vocab
        gate, up = (tensor.shape(arch) for tensor in self.hf)
        return (gate[0] + up[0], *gate[1:])

    def shard(self, arch: ModelArchitecture, tensors: Sequence[Tensor], rank: int, shape: Sequence[int]) -> Tensor:
        del arch
        return torch.cat([_padded_slice(tensor, 0, rank, shape[0] // 2) for tensor in tensors])

    def whole(self, arch: ModelArchitecture, shards: Sequence[Tensor]) -> list[Tensor]:
        del arch
        gates, ups = zip(*(shard.chunk(2) for shard in shards), strict=True)
        return [torch.cat(gates), torch.cat(ups)]


def _pattern(template: str) -> re.Pattern[str]:
    escaped = re.escape(template)
    for placeholder in ("i", "e"):
        escaped = escaped.replace(re.escape(f"{{{placeholder}}}"), rf"(?P<{placeholder}>\d+)")
    return re.compile(escaped)


def _group_rows(arch: ModelArchitecture) -> int:
    return (arch.heads_per_group + 2) * arch.head_dim


def _padded_slice(tensor: Tensor, axis: int, rank: int, size: int) -> Tensor:
    """Elements [rank * size, (rank + 1) * size) along ``axis``, zeros beyond the tensor's end."""
    start = min(rank * size, tensor.shape[axis])
    part = tensor.narrow(axis, start, min(size, tensor.shape[axis] - start))
    missing = size - part.shape[axis]
    if not missing:
        return part.contiguous()
    padding = list(part.shape)
    padding[axis] = missing
    return torch.cat([part, part.new_zeros(padding)], dim=axis)

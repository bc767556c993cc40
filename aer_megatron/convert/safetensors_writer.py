"""Writes sharded safetensors files tensor by tensor, in any order, without holding more than one tensor.

A safetensors file begins with the places of all its tensors, so names, shapes and dtypes have to be known before
the first one is written; the converters know them from config.json.

This file does NOT know what the tensors mean.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import torch
from torch import Tensor

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
# the dtypes of models that are trained on: quantized values are nothing without their scales
TORCH_DTYPE_OF = {name: dtype for dtype, name in _DTYPES.items() if not name.startswith(("F8", "I8", "I16"))}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of a tensor. Example: ``TensorSpec((4096,), torch.bfloat16)``"""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def total_bytes(specs: Mapping[str, TensorSpec]) -> int:
    """Returns the size of all tensors together."""
    return sum(spec.num_bytes for spec in specs.values())


class SafetensorsWriter:
    """The safetensors files of one model in the folder ``work``; ``write`` every tensor once, then ``finish``.

    Use it in a ``with`` block, which closes the files. Raises ValueError for a dtype that safetensors does not have.
    """

    def __init__(self, work: Path, specs: Mapping[str, TensorSpec], *, max_shard_bytes: int) -> None:
        """``specs`` in the order of the files; a file is closed before it would exceed ``max_shard_bytes``."""
        if not specs:
            raise ValueError("there are no tensors to write")
        self._work = work
        self._specs = specs
        self._stack = ExitStack()
        self._missing = set(specs)
        groups = _groups(specs, max_shard_bytes)
        self._file_names = [_file_name(number, len(groups)) for number in range(len(groups))]
        self._weight_map = {n: file for file, names in zip(self._file_names, groups, strict=True) for n in names}
        self._places: dict[str, tuple[IO[bytes], int]] = {}
        for file_name, names in zip(self._file_names, groups, strict=True):
            self._start(file_name, names)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes one tensor at its place, in its planned dtype.

        Raises ValueError for a tensor that is not planned, comes twice or has another shape.
        """
        if name not in self._missing:
            raise ValueError(f"tensor {name} comes twice" if name in self._specs else f"tensor {name} is not expected")
        spec = self._specs[name]
        if tuple(tensor.shape) != spec.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {spec.shape}")
        file, offset = self._places[name]
        file.seek(offset)
        file.write(raw_bytes(tensor.detach().to("cpu", spec.dtype)))
        self._missing.remove(name)

    def finish(self) -> None:
        """Hands all bytes to the operating system and writes the index, if there are two files.

        Raises ValueError naming tensors that were never written.
        """
        if self._missing:
            absent = sorted(self._missing)
            raise ValueError(f"{len(absent)} tensors were not written: {', '.join(absent[:4])}")
        self._stack.close()
        if len(self._file_names) > 1:
            total = {"total_size": total_bytes(self._specs)}
            content = {"metadata": total, "weight_map": dict(sorted(self._weight_map.items()))}
            (self._work / INDEX_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def _start(self, file_name: str, names: list[str]) -> None:
        header = safetensors_header({name: self._specs[name] for name in names})
        file = self._stack.enter_context((self._work / file_name).open("wb"))
        file.write(header)
        place = len(header)
        for name in names:
            self._places[name] = (file, place)
            place += self._specs[name].num_bytes


def safetensors_header(specs: Mapping[str, TensorSpec]) -> bytes:
    """Returns what a safetensors file of these tensors, one after the other in this order, begins with.

    Raises ValueError for a dtype that safetensors does not have.
    """
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, spec in specs.items():
        if spec.dtype not in _DTYPES:
            raise ValueError(f"{name}: safetensors files hold no {spec.dtype}")
        start, end = end, end + spec.num_bytes
        table[name] = {"dtype": _DTYPES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def raw_bytes(tensor: Tensor) -> memoryview:
    """Returns the bytes of a CPU tensor, without a copy where it is contiguous."""
    array: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _groups(specs: Mapping[str, TensorSpec], max_shard_bytes: int) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    held = 0
    for name, spec in specs.items():
        if groups[-1] and held + spec.num_bytes > max_shard_bytes:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += spec.num_bytes
    return groups


def _file_name(number: int, count: int) -> str:
    return SINGLE_NAME if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"

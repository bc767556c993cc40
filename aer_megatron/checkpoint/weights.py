"""The weights of a run's checkpoint, read without a run: one whole Hugging Face tensor at a time.

This file does NOT know optimizer state (tensors.py) and needs no process group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from aer_megatron.checkpoint.manifest import (
    MANIFEST_NAME,
    Manifest,
    check_file,
    manifest_from_json,
    read_manifest_text,
)
from aer_megatron.convert.architecture import ModelArchitecture
from aer_megatron.convert.mapping import find_row, hf_names, shards_to_hf
from aer_megatron.convert.stream import all_names

_WEIGHT = "weight/"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def is_run_checkpoint(path: Path) -> bool:
    """Returns whether ``path`` is a finished checkpoint folder of a run."""
    return (path / MANIFEST_NAME).is_file()


class RunCheckpoint:
    """Read-only access to the weights in a ``step_*`` folder.

    Raises ValueError at construction where the manifest is damaged, or a model file is missing, truncated or changed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        file = path / MANIFEST_NAME
        if not file.is_file():
            raise ValueError(f"{path} holds no {MANIFEST_NAME}; give a step_* folder of a run")
        self.manifest: Manifest = manifest_from_json(read_manifest_text(path), file)
        if self.manifest.dtype not in _DTYPES:
            raise ValueError(f"{file}: dtype={self.manifest.dtype[:80]!r} is none of {', '.join(_DTYPES)}")
        self._holders: dict[str, list[Path]] = {}  # weight -> its files, by tensor-parallel rank
        for name, entry in sorted(self.manifest.files.items()):
            if entry.part != "model":
                continue
            check_file(path / name, entry)
            with safe_open(path / name, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 - not a dict
                    if key.startswith(_WEIGHT):
                        self._holders.setdefault(key.removeprefix(_WEIGHT), []).append(path / name)

    def dtypes(self, arch: ModelArchitecture) -> dict[str, torch.dtype]:
        """HF name -> dtype of the stored weights."""
        return dict.fromkeys(hf_names(arch), _DTYPES[self.manifest.dtype])

    def tensors(self, arch: ModelArchitecture) -> Iterator[tuple[str, Tensor]]:
        """Yields (HF name, whole tensor). Raises ValueError naming a weight that is missing or of another shape."""
        stored = replace(arch, num_padding_groups=self.manifest.layout.num_padding_groups)
        for name in all_names(stored):
            spelled = next((each for each in _spellings(stored, name) if each in self._holders), None)
            if spelled is None:
                raise ValueError(f"{self.path} holds no {name}; config.json describes another model")
            yield from shards_to_hf(stored, name, [_read(file, spelled) for file in self._holders[spelled]])


def _spellings(arch: ModelArchitecture, name: str) -> list[str]:
    """The names of one parameter under the local and under TransformerEngine's layer spec."""
    row, indices = find_row(arch, name)
    return [template.format(**indices) for template in (row.megatron, row.te) if template]


def _read(file: Path, name: str) -> Tensor:
    try:
        with safe_open(file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(_WEIGHT + name)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged at {name}: {error}") from error
    return tensor

"""A checkpoint to convert: Megatron-Core's distributed format, or the step_* folder of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from aer_megatron.checkpoint.folder import CheckpointFolder
from aer_megatron.checkpoint.weights import RunCheckpoint, is_run_checkpoint
from aer_megatron.convert.architecture import ModelArchitecture
from aer_megatron.convert.hf_config import architecture_from_hf_config
from aer_megatron.convert.hf_folder import read_hf_config
from aer_megatron.convert.megatron_folder import MegatronFolder
from aer_megatron.convert.stream import iter_stored_as_hf, stored_architecture, stored_hf_dtypes
from aer_megatron.report.writer import read_run_manifest


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint as Hugging Face tensors. ``dtypes``: name -> dtype in which it is stored."""

    path: Path
    arch: ModelArchitecture
    tensors: Callable[[], Iterator[tuple[str, Tensor]]]
    dtypes: dict[str, torch.dtype]
    is_distributed: bool  # Megatron-Core's own loader reads it


def locate(place: Path, hf: str | None) -> tuple[Path, Path]:
    """Returns (checkpoint, folder of its config.json): of a run the newest one, and the model.path that it recorded."""
    finished = CheckpointFolder(place / "checkpoints", 1).finished()
    path = finished[max(finished)] if finished else place
    if hf is None and is_run_checkpoint(path):
        recorded = read_run_manifest(path.parent.parent).get("config")
        model = recorded.get("model") if isinstance(recorded, dict) else None
        hf = str(model.get("path", path)) if isinstance(model, dict) else None
    return path, Path(hf or path)


def open_checkpoint(path: Path, hf: Path) -> Checkpoint:
    """Returns the checkpoint, checked against config.json of the folder ``hf``. Raises ValueError for what fits not."""
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder")
    if is_run_checkpoint(path):
        if not (hf / "config.json").is_file():
            raise ValueError(
                f"{path} is a run's checkpoint, and {hf} has no config.json of its model; name the run's model.path "
                "with --hf"
            )
        arch = architecture_from_hf_config(read_hf_config(hf))
        run = RunCheckpoint(path)
        return Checkpoint(path, arch, lambda: run.tensors(arch), run.dtypes(arch), is_distributed=False)
    stored = MegatronFolder(path)
    arch = stored_architecture(architecture_from_hf_config(read_hf_config(hf)), stored)
    dtypes = stored_hf_dtypes(arch, stored)
    return Checkpoint(path, arch, lambda: iter_stored_as_hf(arch, stored), dtypes, is_distributed=True)

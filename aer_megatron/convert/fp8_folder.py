"""The FP8 checkpoint of a Hugging Face folder: what servers of ``rollout.quantization = "fp8"`` are started from.

This file does NOT know the format of the weights; convert/fp8_weights.py does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aer_megatron.convert.architecture import ModelArchitecture
from aer_megatron.convert.fp8_weights import fp8_config, fp8_specs, iter_fp8_weights
from aer_megatron.convert.hf_config import architecture_from_hf_config
from aer_megatron.convert.hf_folder import HFFolder, config_with_dtype, copy_extra_files, new_folder
from aer_megatron.convert.mapping import check_hf_tensors, hf_names
from aer_megatron.convert.safetensors_writer import SafetensorsWriter, TensorSpec


def fp8_folder_config(hf_config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Returns config.json of the folder that ``write_fp8_folder`` makes of a model."""
    return fp8_config(config_with_dtype(hf_config, dtype))


def fp8_bytes(arch: ModelArchitecture, dtype: torch.dtype) -> int:
    """Returns the size of the tensors of such a folder."""
    return sum(spec.num_bytes for spec in _specs(arch, dtype).values())


def _specs(arch: ModelArchitecture, dtype: torch.dtype) -> dict[str, TensorSpec]:
    return fp8_specs({name: TensorSpec(shape, dtype) for name, shape in hf_names(arch).items()})


def write_fp8_folder(
    source: Path, target: Path, *, dtype: torch.dtype, max_shard_bytes: int, advance: Callable[[int], None]
) -> Path:
    """Returns ``target``, newly written: the model of ``source`` with its projections in blocks of FP8.

    Weights are rounded to ``dtype``, in which the other tensors stay, before they are quantised. ``advance`` is told
    the bytes written. Memory: a few times the largest tensor.

    Raises:
        ValueError: ``target`` exists, or ``source`` is not a model that can be converted.
        OSError: the disk is full; nothing is left under the name of ``target``.
    """
    folder = HFFolder(source)
    arch = architecture_from_hf_config(folder.config)
    check_hf_tensors(arch, folder.shapes(), folder.get)
    specs = _specs(arch, dtype)

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name in hf_names(arch):
            yield name, folder.get(name).to(dtype)

    with new_folder(target) as work, SafetensorsWriter(work, specs, max_shard_bytes=max_shard_bytes) as writer:
        for name, tensor in iter_fp8_weights(weights()):
            writer.write(name, tensor)
            advance(specs[name].num_bytes)
        writer.finish()
        config = json.dumps(fp8_folder_config(folder.config, dtype), indent=2)
        (work / "config.json").write_text(config + "\n", encoding="utf-8")
        copy_extra_files(source, work)
    return target

"""Converts whole folders: Hugging Face -> Megatron's distributed checkpoint, Megatron tensors -> Hugging Face, -> FP8.

All stream, so memory is a few times the largest tensor, and write beside the target and rename: whatever goes wrong, a
full disk included, nothing is left under the target's name. ``compare`` is the proof afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from aer_megatron.convert.architecture import ModelArchitecture, check_parallel, pad_query_groups
from aer_megatron.convert.fp8_weights import fp8_config, fp8_specs, iter_fp8_weights
from aer_megatron.convert.hf_config import architecture_from_hf_config
from aer_megatron.convert.hf_folder import HFFolder, read_hf_config
from aer_megatron.convert.hf_writer import (
    MAX_SHARD_BYTES,
    Advance,
    config_with_dtype,
    copy_extra_files,
    ignore_progress,
    write_hf_config,
    write_hf_folder,
)
from aer_megatron.convert.mapping import check_hf_tensors, hf_names, hf_specs
from aer_megatron.convert.megatron_folder import MegatronWriter
from aer_megatron.convert.safetensors_writer import TORCH_DTYPE_OF
from aer_megatron.convert.stream import write_megatron
from aer_megatron.files.disk_space import has_space, space_report
from aer_megatron.files.new_folder import new_folder

_METADATA_BYTES = 1 << 24  # headers, tables and tokenizer files, generously


def checked_hf_folder(path: Path, tp: int) -> tuple[HFFolder, ModelArchitecture]:
    """Returns the folder and its architecture, padded so that its heads split ``tp`` ways.

    Raises ValueError naming an unsupported architecture, a tensor that is missing, unexpected or mis-shaped, or what
    ``tp`` does not divide.
    """
    folder = HFFolder(path)
    arch = pad_query_groups(architecture_from_hf_config(folder.config), tp)
    check_parallel(arch, tp, 1)
    check_hf_tensors(arch, folder.shapes(), folder.get)
    return folder, arch


def hf_dtypes(folder: HFFolder, arch: ModelArchitecture) -> dict[str, torch.dtype]:
    """Name -> dtype of the tensors that the model needs. Raises ValueError for quantized ones."""
    found = {}
    for name in hf_names(arch):
        text = folder.dtype(name)
        if text not in TORCH_DTYPE_OF:
            raise ValueError(f"{folder.path}: {name} is {text}; convert the checkpoint to bf16 or fp32 first")
        found[name] = TORCH_DTYPE_OF[text]
    return found


def hf_to_megatron(
    folder: HFFolder,
    arch: ModelArchitecture,
    target: Path,
    *,
    dtype: torch.dtype | None,
    max_file_bytes: int,
    advance: Advance,
) -> Path:
    """Returns ``target``, newly written: a distributed checkpoint beside config.json, tokenizer and other small files.

    Raises ValueError if ``target`` exists, OSError where the disk is full.
    """
    with new_folder(target) as work, MegatronWriter(work, max_file_bytes=max_file_bytes) as writer:
        write_megatron(arch, folder.get, writer, dtype=dtype, advance=advance)
        writer.finish()
        write_hf_config(work, config_with_dtype(folder.config, dtype))
        copy_extra_files(folder.path, work)
    return target


def megatron_to_hf(
    tensors: Iterable[tuple[str, Tensor]],
    arch: ModelArchitecture,
    target: Path,
    *,
    dtypes: Mapping[str, torch.dtype],
    like: Path,
    max_shard_bytes: int,
    advance: Advance,
) -> Path:
    """Returns ``target``, newly written from the (HF name, tensor) pairs of a model.

    dtypes: the dtype in which each tensor is written. like: the folder whose config.json, tokenizer and generation
    settings are carried over. Raises as ``write_hf_folder`` does.
    """
    same = set(dtypes.values())
    config = config_with_dtype(read_hf_config(like), same.pop() if len(same) == 1 else None)
    specs = hf_specs(arch, dtypes)
    return write_hf_folder(
        target, tensors, specs, config=config, like=like, max_shard_bytes=max_shard_bytes, advance=advance
    )


def hf_to_fp8(
    source: Path,
    target: Path,
    *,
    dtype: torch.dtype,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    advance: Advance = ignore_progress,
) -> Path:
    """Returns ``target``, newly written: the model of ``source`` with its projections in blocks of FP8.

    Weights are rounded to ``dtype``, in which the other tensors stay, before they are quantised. It is what servers of
    ``rollout.quantization = "fp8"`` are started from. Raises ValueError where ``source`` is not a model that can be
    converted, and as ``write_hf_folder`` does.
    """
    folder, arch = checked_hf_folder(source, 1)
    return write_hf_folder(
        target,
        iter_fp8_weights((name, folder.get(name).to(dtype)) for name in hf_names(arch)),
        fp8_specs(hf_specs(arch, dtype)),
        config=fp8_config(config_with_dtype(folder.config, dtype)),
        like=source,
        max_shard_bytes=max_shard_bytes,
        advance=advance,
    )


def check_space(target: Path, num_bytes: int) -> None:
    """Raises ValueError where the disk of ``target`` has too little room for ``num_bytes``."""
    num_bytes += _METADATA_BYTES
    if not has_space(target, num_bytes):
        raise ValueError(f"{space_report(target, num_bytes)}; choose another disk")


def compare(
    expected: Callable[[str], Tensor],
    dtypes: Mapping[str, torch.dtype],
    found: Iterable[tuple[str, Tensor]],
    advance: Advance,
) -> int:
    """Returns the number of tensors in ``found``, all of them equal to the expected ones bit for bit.

    dtypes: names that must be there, and the dtype to which an expected tensor is converted first. Raises
    RuntimeError naming the first tensor that differs in shape, dtype or bits, or is missing or unexpected.
    """
    missing = set(dtypes)
    for name, tensor in found:
        if name not in missing:
            raise RuntimeError(f"verification failed: {name} is not expected")
        missing.remove(name)
        wanted = expected(name).to(dtypes[name])
        if (wanted.shape, wanted.dtype) != (tensor.shape, tensor.dtype):
            raise RuntimeError(
                f"verification failed: {name} is {tensor.dtype} {tuple(tensor.shape)}, expected {wanted.dtype}"
                f" {tuple(wanted.shape)}"
            )
        if not torch.equal(_bits(wanted), _bits(tensor)):
            where = (wanted != tensor).flatten().nonzero()
            raise RuntimeError(f"verification failed: {name} has other bits ({len(where)} elements differ in value)")
        advance(tensor.nbytes)
    if missing:
        raise RuntimeError(f"verification failed: {len(missing)} tensors are missing: {', '.join(sorted(missing)[:4])}")
    return len(dtypes)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)

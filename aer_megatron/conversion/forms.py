"""The conversions of ``aer convert``, each with its progress and its verification."""

from __future__ import annotations

from pathlib import Path

import torch

from aer_megatron.console.command_line import Given
from aer_megatron.console.standard_streams import say
from aer_megatron.conversion.checkpoint import locate, open_checkpoint
from aer_megatron.conversion.progress import progress_bar
from aer_megatron.convert import folders
from aer_megatron.convert.fp8_weights import fp8_specs
from aer_megatron.convert.hf_writer import MAX_SHARD_BYTES
from aer_megatron.convert.mapping import hf_specs
from aer_megatron.convert.safetensors_writer import total_bytes

_MEGATRON_FILE_BYTES = 4 * 10**9


def hf_to_megatron(given: Given, model: Path, output: Path) -> None:
    """Writes the distributed checkpoint ``output``, its heads padded for --tp."""
    dtype = _torch_dtype(given)
    folder, arch = folders.checked_hf_folder(model, given["tp"] or 1)
    stored = folders.hf_dtypes(folder, arch)
    num_bytes = total_bytes(hf_specs(arch, dtype or stored))
    folders.check_space(output, num_bytes)
    size = _file_bytes(given, _MEGATRON_FILE_BYTES)
    with progress_bar("to Megatron", num_bytes) as advance:
        folders.hf_to_megatron(folder, arch, output, dtype=dtype, max_file_bytes=size, advance=advance)
    if given["verify"]:
        from aer_megatron.conversion.verify import verify_megatron_folder  # Megatron-Core takes seconds to import

        for line in verify_megatron_folder(folder, arch, output):
            say(line, error=True)


def megatron_to_hf(given: Given, place: Path, output: Path) -> None:
    """Writes the Hugging Face folder ``output`` from a distributed checkpoint, a run or a run's step_* folder."""
    checkpoint, like = locate(place, given["hf"])
    source = open_checkpoint(checkpoint, like)
    dtype = _torch_dtype(given)
    dtypes = dict.fromkeys(source.dtypes, dtype) if dtype else source.dtypes
    num_bytes = total_bytes(hf_specs(source.arch, dtypes))
    folders.check_space(output, num_bytes)
    with progress_bar("to Hugging Face", num_bytes) as advance:
        folders.megatron_to_hf(
            source.tensors(),
            source.arch,
            output,
            dtypes=dtypes,
            like=like,
            max_shard_bytes=_file_bytes(given, MAX_SHARD_BYTES),
            advance=advance,
        )
    if given["verify"]:
        from aer_megatron.conversion.verify import verify_hf_folder

        for line in verify_hf_folder(source, output):
            say(line, error=True)


def hf_to_fp8(given: Given, model: Path, output: Path) -> None:
    """Writes the FP8 checkpoint ``output``; what is not FP8 is in --dtype, bfloat16 without it."""
    dtype = _torch_dtype(given) or torch.bfloat16
    if dtype == torch.float16:
        raise ValueError("--dtype=float16 is no dtype of a run (model.dtype); use bfloat16 or float32")
    _, arch = folders.checked_hf_folder(model, 1)
    num_bytes = total_bytes(fp8_specs(hf_specs(arch, dtype)))
    folders.check_space(output, num_bytes)
    size = _file_bytes(given, MAX_SHARD_BYTES)
    with progress_bar("quantise", num_bytes) as advance:
        folders.hf_to_fp8(model, output, dtype=dtype, max_shard_bytes=size, advance=advance)


def _torch_dtype(given: Given) -> torch.dtype | None:
    return getattr(torch, given["dtype"]) if given["dtype"] else None


def _file_bytes(given: Given, default: int) -> int:
    return int(given["max-file-gb"] * 10**9) if given["max-file-gb"] else default

"""Writes Hugging Face model folders: config.json, safetensors files and their index, tokenizer and other small files.

Tensors are written as they come, in any order, and one at a time is held: their shapes and dtypes are known before.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aer_megatron.convert.safetensors_writer import SafetensorsWriter, TensorSpec
from aer_megatron.files.new_folder import new_folder

MAX_SHARD_BYTES = 5 * 10**9  # of one safetensors file
Advance = Callable[[int], None]  # told how many bytes have been written since the last call
# Everything beside the weights that makes a folder usable: generation settings, tokenizers, chat templates.
_EXTRA_FILES = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates",
    "LICENSE*",
)


def ignore_progress(num_bytes: int) -> None:
    """Takes the bytes written and does nothing with them."""


def write_hf_folder(
    target: Path,
    tensors: Iterable[tuple[str, Tensor]],
    specs: Mapping[str, TensorSpec],
    *,
    config: Mapping[str, Any],
    like: Path | None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    advance: Advance = ignore_progress,
) -> Path:
    """Returns ``target``, newly written and on disk.

    Args:
        tensors: (name, tensor) pairs, each written in the dtype of ``specs`` before the next one is asked for.
        specs: name -> shape and dtype of all tensors, in the order in which they lie in the files.
        config: the content of config.json.
        like: the folder whose tokenizer, generation settings and templates are carried over; None = there are none.
        max_shard_bytes: a file is closed before it would exceed it; one larger tensor gets a file of its own.

    Raises:
        ValueError: ``target`` exists, or a tensor is missing, not expected, comes twice or has another shape.
        OSError: the disk is full. Whatever is raised, nothing is left under the name of ``target``.
    """
    with new_folder(target) as work:
        fill_hf_folder(work, tensors, specs, config=config, max_shard_bytes=max_shard_bytes, advance=advance)
        if like is not None:
            copy_extra_files(like, work)
    return target


def fill_hf_folder(
    work: Path,
    tensors: Iterable[tuple[str, Tensor]],
    specs: Mapping[str, TensorSpec],
    *,
    config: Mapping[str, Any],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    advance: Advance = ignore_progress,
) -> None:
    """Writes config.json, safetensors files and index into the existing folder ``work``, without flushing them.

    For callers that add files of their own inside ``new_folder``; arguments and errors as for ``write_hf_folder``.
    """
    with SafetensorsWriter(work, specs, max_shard_bytes=max_shard_bytes) as writer:
        for name, tensor in tensors:
            writer.write(name, tensor)
            advance(specs[name].num_bytes)
        writer.finish()
    write_hf_config(work, config)


def write_hf_config(work: Path, config: Mapping[str, Any]) -> None:
    """Writes config.json."""
    (work / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def copy_extra_files(source: Path, work: Path) -> None:
    """Copies tokenizer files, generation settings and templates that ``work`` does not have."""
    for pattern in _EXTRA_FILES:
        for file in source.glob(pattern):
            if file.is_dir():
                shutil.copytree(file, work / file.name, dirs_exist_ok=True)
            elif not (work / file.name).exists():
                shutil.copyfile(file, work / file.name)


def config_with_dtype(config: Mapping[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """Returns config.json's content with its dtype fields set, where ``dtype`` is given."""
    if dtype is None:
        return dict(config)
    name = str(dtype).removeprefix("torch.")
    # transformers 5 writes "dtype", 4 and SGLang read "torch_dtype"
    return dict(config) | {"dtype": name} | ({"torch_dtype": name} if "torch_dtype" in config else {})

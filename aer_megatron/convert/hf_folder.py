"""Hugging Face model folders on disk: read one tensor at a time, write one whole folder or nothing.

The one file of convert/ that opens files: the folder format (config.json, *.safetensors, an index, tokenizer
files) is a matter of Hugging Face names, and the converters, the actor and the weight transports all need the
same reader.

Reading maps the files into memory: a tensor costs nothing until its elements are used. Writing streams: at
most one output file's tensors (``max_shard_bytes``) are held, and the finished folder is renamed into place.

This file does NOT know Megatron names, ranks or devices other than the CPU.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from aer_megatron.files.json_input import kind_of, read_json_object

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_FILE_NAME = re.compile(r"[\w.+=-]{1,200}\.safetensors", re.ASCII)
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


class HFFolder:
    """Read-only access to the config and the tensors of a Hugging Face folder.

    Example: ``HFFolder(path).get("model.norm.weight")``. Raises ValueError at construction where ``path`` is
    not a folder with config.json and safetensors files that are all there and whole.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config: dict[str, Any] = _read_config(self.path)
        self._files: dict[str, Any] = {}  # file name -> open safetensors handle
        self._file_of: dict[str, str] = {}  # tensor name -> file name
        for file_name, listed in _weight_files(self.path).items():
            handle = _open(self.path / file_name)
            held = set(handle.keys())
            absent = sorted((listed or held) - held)
            if absent:
                raise ValueError(f"{self.path / file_name} lacks {absent[0]}, which {_INDEX} places there")
            self._files[file_name] = handle
            self._file_of.update(dict.fromkeys(sorted(listed or held), file_name))

    def names(self) -> list[str]:
        """The names of all tensors, file by file."""
        return list(self._file_of)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of all tensors, from the file headers alone."""
        return {name: tuple(self._slice(name).get_shape()) for name in self._file_of}

    def dtype(self, name: str) -> str:
        """The safetensors dtype of a tensor, such as "BF16"."""
        return str(self._slice(name).get_dtype())

    def get(self, name: str) -> Tensor:
        """The CPU tensor ``name``, mapped from its file: do not write to it. Raises ValueError if absent."""
        # a mapping of its own: pages that a tensor touched go when the tensor goes, not when the folder does
        path = self.path / self._file_name(name)
        with _open(path) as file:
            try:
                tensor: Tensor = file.get_tensor(name)
            except SafetensorError as error:
                raise ValueError(f"{path}: tensor {name} cannot be read ({error}); download it again") from None
        return tensor

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def _slice(self, name: str) -> Any:
        return self._handle(name).get_slice(name)

    def _handle(self, name: str) -> Any:
        return self._files[self._file_name(name)]

    def _file_name(self, name: str) -> str:
        if name not in self._file_of:
            raise ValueError(f"{self.path} holds no tensor {name}")
        return self._file_of[name]


def write_hf_folder(
    path: str | os.PathLike[str],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    config: Mapping[str, Any],
    extra_files_from: str | os.PathLike[str] | None,
    max_shard_bytes: int,
    dtype: torch.dtype | None,
) -> Path:
    """The folder ``path``, newly written: config.json, safetensors files, index, and the extra files.

    tensors: (name, tensor) pairs, consumed one at a time; a file is closed before it would exceed
        ``max_shard_bytes`` (one larger tensor gets a file of its own). A tensor is read when its file is
        written: its memory must not be reused before. Floating-point tensors become ``dtype``, if given.
    config: config.json's content; "dtype" (and "torch_dtype", if present) is set where ``dtype`` is given.
    extra_files_from: folder whose tokenizer files, generation_config.json and templates are copied, or None.

    Raises ValueError if ``path`` exists, a name comes twice or there is no tensor; OSError (disk full, ...)
    as is. Whatever is raised, nothing is left under ``path``.
    """
    target = Path(path)
    with new_folder(target) as work:
        fill_hf_folder(work, tensors, config=config, max_shard_bytes=max_shard_bytes, dtype=dtype)
        if extra_files_from is not None:
            copy_extra_files(Path(extra_files_from), work)
    return target


def fill_hf_folder(
    work: Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    config: Mapping[str, Any],
    max_shard_bytes: int,
    dtype: torch.dtype | None,
) -> None:
    """Returns nothing; writes config.json, safetensors files and index into the existing folder ``work``.

    For callers that add files of their own inside ``new_folder``; arguments as for ``write_hf_folder``.
    """
    _write_index(work, _write_shards(work, tensors, max_shard_bytes, dtype))
    text = json.dumps(config_with_dtype(config, dtype), indent=2)
    (work / "config.json").write_text(text + "\n", encoding="utf-8")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``target`` when the block ends, or is removed if it raises.

    Raises ValueError if ``target`` exists. Files are flushed to disk before the rename.
    """
    if target.exists():
        raise ValueError(f"{target} exists already; choose another folder or remove it first")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    work.mkdir()
    try:
        yield work
        for file in work.rglob("*"):
            flush_to_disk(file)
        flush_to_disk(work)
        work.rename(target)
        flush_to_disk(target.parent)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def flush_to_disk(path: Path) -> None:
    """Waits until the file's bytes, or the folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; give the folder of a Hugging Face model")
    if not file.is_file():
        raise ValueError(f"{path} holds no config.json; give the folder of a Hugging Face model")
    return read_json_object(file)


def _weight_files(path: Path) -> Mapping[str, set[str] | None]:
    """File name -> tensors that the index places there; None = all that the file holds, without an index."""
    index = path / _INDEX
    if index.is_file():
        files: dict[str, set[str]] = {}
        for name, file in _weight_map(index).items():
            files.setdefault(file, set()).add(name)
        missing = [file for file in files if not (path / file).is_file()]
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)} of {len(files)} files in {_INDEX}; download it again")
        return dict(sorted(files.items()))
    if (path / _SINGLE).is_file():
        return {_SINGLE: None}
    if any(path.glob("*.bin")) or any(path.glob("*.pth")) or any(path.glob("*.gguf")):
        raise ValueError(
            f"{path} holds weights in another format than safetensors; convert it once: load it with"
            " transformers' AutoModelForCausalLM.from_pretrained(...), write it with save_pretrained(NEW)"
        )
    raise ValueError(f"{path} holds neither {_SINGLE} nor {_INDEX}; is the download complete?")


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name; a file of the same folder, whatever the index says."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(
            f"{index} is not a safetensors index: weight_map must be an object, it is {kind_of(weight_map)}"
        )
    for name, file in weight_map.items():
        if not isinstance(file, str) or _FILE_NAME.fullmatch(file) is None:
            raise ValueError(
                f"{index} is not a safetensors index: weight_map places {name[:80]!r} in {repr(file)[:80]}, which is "
                "no name of a .safetensors file beside it; download it again"
            )
    return weight_map


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} is truncated or not a safetensors file ({error}); download or write it again"
        ) from error


def _write_shards(
    work: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int, dtype: torch.dtype | None
) -> list[dict[str, int]]:
    """Per written file (numbered, in order): tensor name -> bytes."""
    files: list[dict[str, int]] = []
    pending: dict[str, Tensor] = {}
    sizes: dict[str, int] = {}
    seen: set[str] = set()

    def flush() -> None:
        file = work / _numbered(len(files))
        file.touch()
        mode = file.stat().st_mode  # safetensors makes files private whatever the umask says
        try:
            save_file(pending, file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"could not write {file}: {error}") from error
        file.chmod(mode)
        files.append(dict(sizes))
        pending.clear()
        sizes.clear()

    for name, tensor in tensors:
        if name in seen:
            raise ValueError(f"tensor {name} comes twice")
        seen.add(name)
        stored = tensor.detach().to("cpu", dtype if dtype and tensor.is_floating_point() else tensor.dtype)
        size = stored.numel() * stored.element_size()
        if pending and sum(sizes.values()) + size > max_shard_bytes:
            flush()
        # safetensors refuses tensors that share memory, such as views of one shard
        pending[name] = stored.clone() if stored.untyped_storage().nbytes() != size else stored.contiguous()
        sizes[name] = size
    if pending:
        flush()
    if not files:
        raise ValueError("there are no tensors to write")
    return files


def _numbered(index: int) -> str:
    return f"part-{index:05d}.safetensors"


def _write_index(work: Path, files: list[dict[str, int]]) -> None:
    """Renames the written files to their final names, which hold their number, and writes the index."""
    if len(files) == 1:
        (work / _numbered(0)).rename(work / _SINGLE)
        return
    weight_map: dict[str, str] = {}
    for index, sizes in enumerate(files):
        final = f"model-{index + 1:05d}-of-{len(files):05d}.safetensors"
        (work / _numbered(index)).rename(work / final)
        weight_map.update(dict.fromkeys(sizes, final))
    total = sum(sum(sizes.values()) for sizes in files)
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (work / _INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def copy_extra_files(source: Path, work: Path) -> None:
    """Returns nothing; copies tokenizer files, generation settings and templates that ``work`` does not have."""
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

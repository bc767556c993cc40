"""Reads Hugging Face model folders, one tensor at a time: config.json, *.safetensors and their index.

Files are mapped into memory: a tensor costs nothing until its elements are used. This file does NOT know Megatron
names, ranks or devices other than the CPU.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from aer_megatron.convert.safetensors_writer import INDEX_NAME, SINGLE_NAME
from aer_megatron.files.json_input import kind_of, read_json_object

_FILE_NAME = re.compile(r"[\w.+=-]{1,200}\.safetensors", re.ASCII)


class HFFolder:
    """Read-only access to the config and the tensors of a Hugging Face folder.

    Example: ``HFFolder(path).get("model.norm.weight")``. Raises ValueError at construction where ``path`` is
    not a folder with config.json and safetensors files that are all there and whole.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config: dict[str, Any] = read_hf_config(self.path)
        self._files: dict[str, Any] = {}  # file name -> open safetensors handle
        self._file_of: dict[str, str] = {}  # tensor name -> file name
        for file_name, listed in _weight_files(self.path).items():
            handle = _open(self.path / file_name)
            held = set(handle.keys())
            absent = sorted((listed or held) - held)
            if absent:
                raise ValueError(f"{self.path / file_name} lacks {absent[0]}, which {INDEX_NAME} places there")
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


def read_hf_config(path: Path) -> dict[str, Any]:
    """The content of config.json of a folder, which need not hold weights. Raises ValueError where there is none."""
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; give the folder of a Hugging Face model")
    file = path / "config.json"
    if not file.is_file():
        raise ValueError(f"{path} holds no config.json; give the folder of a Hugging Face model")
    return read_json_object(file)


def _weight_files(path: Path) -> Mapping[str, set[str] | None]:
    """File name -> tensors that the index places there; None = all that the file holds, without an index."""
    index = path / INDEX_NAME
    if index.is_file():
        files: dict[str, set[str]] = {}
        for name, file in _weight_map(index).items():
            files.setdefault(file, set()).add(name)
        missing = [file for file in files if not (path / file).is_file()]
        if missing:
            lost = f"{', '.join(missing)} of {len(files)} files in {INDEX_NAME}"
            raise ValueError(f"{path} lacks {lost}; download it again")
        return dict(sorted(files.items()))
    if (path / SINGLE_NAME).is_file():
        return {SINGLE_NAME: None}
    if any(path.glob("*.bin")) or any(path.glob("*.pth")) or any(path.glob("*.gguf")):
        raise ValueError(
            f"{path} holds weights in another format than safetensors; convert it once: load it with"
            " transformers' AutoModelForCausalLM.from_pretrained(...), write it with save_pretrained(NEW)"
        )
    raise ValueError(f"{path} holds neither {SINGLE_NAME} nor {INDEX_NAME}; is the download complete?")


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

"""The manifest of a checkpoint: what it is of, which files belong to it, and whether they are intact.

One ``manifest.json`` per checkpoint names every file with its size and SHA-256 (``sha256sum`` can check it, too).
This file does NOT know ranks, tensors or Megatron.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FORMAT = "aer-megatron checkpoint"
FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"

# zero query groups depend on the tensor-parallel size, not on the model
_LAYOUT_FIELDS = frozenset({"num_padding_groups"})


@dataclass(frozen=True, slots=True)
class Layout:
    """How tensors are cut over ranks. Two runs of one layout read each other's files as they are."""

    tp: int
    pp: int
    dp: int
    padded_vocab: int
    num_padding_groups: int
    transformer_engine: bool  # its layers name parameters in another way than the local ones
    # manifests written before there were these have none
    ep: int = 1
    cp: int = 1
    vpp: int = 1


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file. ``part`` groups files of a kind; ``rank`` wrote the file, and checks it when it is read back."""

    part: str
    rank: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything about a checkpoint but its tensors.

    ``model`` is the architecture as a table, ``dtype`` that of the weights, ``num_updates`` the optimizer steps taken
    (Adam's step and the place in the learning-rate schedule), ``state`` the caller's own table.
    """

    step: int
    num_updates: int
    model: Mapping[str, Any]
    dtype: str
    layout: Layout
    versions: Mapping[str, str]
    state: Mapping[str, Any]
    files: Mapping[str, FileEntry]

    def to_json(self) -> str:
        """Returns the manifest's text; ``manifest_from_json`` is its inverse."""
        return json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}, indent=1) + "\n"


def manifest_from_json(text: str, path: Path) -> Manifest:
    """Returns the manifest in ``text``, which was read from ``path``.

    Raises:
        ValueError: not a manifest, cut short, or of another format version.
    """
    try:
        table = json.loads(text)
        if table.pop("format") != FORMAT:
            raise KeyError("format")
        version = table.pop("format_version")
        if version == FORMAT_VERSION:
            layout = Layout(**table.pop("layout"))
            files = {name: FileEntry(**entry) for name, entry in table.pop("files").items()}
            return Manifest(layout=layout, files=files, **table)
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a complete checkpoint manifest ({len(text)} characters; {error}); remove the folder "
            f"{path.parent.name} to resume from the checkpoint before it"
        ) from None
    raise ValueError(
        f"{path} has format_version={version!r}, this program reads {FORMAT_VERSION}; resume with the version that "
        "wrote it, or start from its weights exported to Hugging Face format"
    )


def file_entry(path: Path, *, part: str, rank: int) -> FileEntry:
    """Returns size and digest of a file just written, after it has reached the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileEntry(part=part, rank=rank, num_bytes=file.tell(), sha256=digest)


def check_file(path: Path, entry: FileEntry) -> None:
    """Returns nothing; raises ValueError where the file is missing, of another size or of other content."""
    remedy = f"remove the folder {path.parent.name} to resume from the checkpoint before it, or restore the file"
    if not path.is_file():
        raise ValueError(f"{path} is missing (expected {entry.num_bytes} bytes); {remedy}")
    found = path.stat().st_size
    if found != entry.num_bytes:
        raise ValueError(f"{path} has {found} bytes, expected {entry.num_bytes}; {remedy}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != entry.sha256:
        raise ValueError(
            f"{path} has changed since it was written: {found} bytes as expected, SHA-256 {digest[:16]}..., "
            f"expected {entry.sha256[:16]}...; {remedy}"
        )


def check_model(manifest: Manifest, model: Mapping[str, Any], dtype: str, folder: Path) -> None:
    """Returns nothing; raises ValueError naming the first field in which ``model`` or ``dtype`` differs."""
    here = json.loads(json.dumps(model))  # tuples and lists alike
    for field in dict.fromkeys([*manifest.model, *here]):
        before, now = manifest.model.get(field), here.get(field)
        if before != now and field not in _LAYOUT_FIELDS:
            raise ValueError(
                f"{folder} is a checkpoint of another model: {field} is {before!r} there and {now!r} in model.path; "
                "set model.path to the model it was made from, or another run.output_dir"
            )
    if manifest.dtype != dtype:
        raise ValueError(
            f"{folder} holds {manifest.dtype} weights, model.dtype is {dtype!r}; set model.dtype={manifest.dtype!r}, "
            "or start a new run.output_dir from its weights exported to Hugging Face format"
        )

"""The manifest of a checkpoint: what it is of, which files belong to it, and whether they are intact.

One ``manifest.json`` per checkpoint names every file with its size and SHA-256 (``sha256sum`` can check it, too). Its
last line is the SHA-256 of everything before it, so that a changed bit anywhere in the checkpoint is found. What the
text says is checked field by field before a path is made of it. This file does NOT know ranks, tensors or Megatron.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

FORMAT = "aer-megatron checkpoint"
FORMAT_VERSION = 2
_UNSEALED_VERSION = 1  # had no digest of its own
MANIFEST_NAME = "manifest.json"
MAX_BYTES = 1 << 26  # 100,000 ranks need half of it

PARTS = ("model", "optimizer", "rng", "file")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
_SEAL = re.compile(r',\n "sha256": "([0-9a-f]{64})"\n}\n')
_SEAL_CHARACTERS = len(',\n "sha256": ""\n}\n') + 64
_MAX_RANKS = 1 << 20

# zero query groups depend on the tensor-parallel size, not on the model
_LAYOUT_FIELDS = frozenset({"num_padding_groups"})


@dataclass(frozen=True, slots=True)
class TensorLayout:
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
    layout: TensorLayout
    versions: Mapping[str, str]
    state: Mapping[str, Any]
    files: Mapping[str, FileEntry]

    def to_json(self) -> str:
        """Returns the manifest's text; ``manifest_from_json`` is its inverse."""
        table = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        text = json.dumps(table, indent=1).removesuffix("\n}")
        return f'{text},\n "sha256": "{_digest(text)}"\n}}\n'


def read_manifest_text(folder: Path) -> str:
    """Returns the text of ``folder``'s manifest, bit for bit.

    Raises:
        ValueError: it is larger than a manifest can be.
        OSError: it cannot be read.
    """
    path = folder / MANIFEST_NAME
    with path.open("rb") as file:
        raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise ValueError(f"{path} has more than {MAX_BYTES} bytes: it is no checkpoint manifest; remove {folder.name}")
    return raw.decode("latin-1")  # any bytes; a manifest is ASCII, so what is not fails its digest


def manifest_from_json(text: str, path: Path) -> Manifest:
    """Returns the manifest in ``text``, which was read from ``path``.

    Raises:
        ValueError: not a manifest, cut short, changed since it was written, of another format version, or it says what
            no checkpoint can (a file outside of its folder, a size that is none).
    """
    remedy = f"remove the folder {path.parent.name} to resume from the checkpoint before it"
    seal = _seal(text)
    if seal is not None and _digest(text[:-_SEAL_CHARACTERS]) != seal[1]:
        raise ValueError(
            f"{path} has changed since it was written: the SHA-256 in its last line is not that of the lines before it;"
            f" {remedy}, or restore the file"
        )
    try:
        table = json.loads(text)
        if not isinstance(table, dict) or table.pop("format") != FORMAT:
            raise KeyError("format")
        version = table.pop("format_version")
        if version == FORMAT_VERSION and not isinstance(version, bool):
            if seal is None:
                raise ValueError("its last line is not its SHA-256")
            del table["sha256"]
            return _manifest(table)
        if version == _UNSEALED_VERSION and not isinstance(version, bool) and seal is None:
            return _manifest(table)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a complete checkpoint manifest ({len(text)} characters; {error}); {remedy}"
        ) from None
    raise ValueError(
        f"{path} has format_version={version!r}, this program reads {FORMAT_VERSION}; resume with the version that "
        "wrote it, or start from its weights exported to Hugging Face format"
    )


def is_sealed(text: str) -> bool:
    """Returns whether the text of a manifest ends in its own digest; the first format version had none."""
    return _seal(text) is not None


def _seal(text: str) -> re.Match[str] | None:
    return _SEAL.fullmatch(text[-_SEAL_CHARACTERS:])


def check_file_name(name: str) -> None:
    """Returns nothing; raises ValueError unless ``name`` is a plain one that a checkpoint may hold."""
    if not _FILE_NAME.fullmatch(name) or name == MANIFEST_NAME:
        raise ValueError(f"a checkpoint file cannot be named {name!r}: use letters, digits and . _ - only")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _manifest(table: dict[str, Any]) -> Manifest:
    """Returns the manifest of a parsed table; raises ValueError, KeyError or TypeError naming what is wrong."""
    layout = TensorLayout(**_typed(table.pop("layout"), "layout", dict))
    for field in fields(TensorLayout):
        value = getattr(layout, field.name)
        if field.name == "transformer_engine":
            _typed(value, f"layout.{field.name}", bool)
        elif _whole(value, f"layout.{field.name}") < (field.name != "num_padding_groups"):
            raise ValueError(f"layout.{field.name}={value}")
    if math.prod((layout.tp, layout.pp, layout.dp, layout.cp)) > _MAX_RANKS or layout.ep > _MAX_RANKS:
        raise ValueError(f"layout of more than {_MAX_RANKS} ranks")
    manifest = Manifest(layout=layout, files=_files(_typed(table.pop("files"), "files", dict)), **table)
    _whole(manifest.step, "step")
    _whole(manifest.num_updates, "num_updates")
    _typed(manifest.dtype, "dtype", str)
    for name in ("model", "versions", "state"):
        _typed(getattr(manifest, name), name, dict)
    return manifest


def _files(table: dict[str, Any]) -> dict[str, FileEntry]:
    files = {}
    for name, content in table.items():
        check_file_name(name)
        entry = FileEntry(**_typed(content, name, dict))
        if entry.part not in PARTS or not isinstance(entry.part, str):
            raise ValueError(f"{name} is of part {entry.part!r}")
        if _whole(entry.rank, f"{name}: rank") >= _MAX_RANKS:
            raise ValueError(f"{name}: rank={entry.rank}")
        if _whole(entry.num_bytes, f"{name}: num_bytes") >= 1 << 63:
            raise ValueError(f"{name}: num_bytes={entry.num_bytes}")
        if not re.fullmatch(r"[0-9a-f]{64}", _typed(entry.sha256, f"{name}: sha256", str)):
            raise ValueError(f"{name}: sha256={entry.sha256[:80]!r} is no SHA-256")
        files[name] = entry
    return files


def _whole(value: Any, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name}={str(value)[:80]!r} is not a whole number")
    return value


def _typed(value: Any, name: str, kind: type[Any]) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{name} is of type {type(value).__name__}, not {kind.__name__}")
    return value


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

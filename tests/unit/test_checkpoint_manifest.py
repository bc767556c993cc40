"""The manifest: round trip, intact files, and refusals that name what differs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from aer_megatron.actor.checkpoint_manifest import (
    FileEntry,
    Layout,
    Manifest,
    check_file,
    check_model,
    file_entry,
    manifest_from_json,
)

LAYOUT = Layout(tp=2, pp=1, dp=1, padded_vocab=26, num_padding_groups=0, transformer_engine=False)
MODEL = {"family": "qwen3", "num_layers": 28, "rope_scaling": None, "num_padding_groups": 0}
MANIFEST = Manifest(
    step=50,
    num_updates=100,
    model=MODEL,
    dtype="bf16",
    layout=LAYOUT,
    versions={"torch": "2.13.0"},
    state={"controller": {"alpha": 0.1 + 0.2, "initial_entropy": None}, "cursor": {"epoch": 1}},
    files={"ledger": FileEntry(part="file", rank=0, num_bytes=3, sha256="ab")},
)


def _written(folder: Path, content: bytes = b"weights") -> tuple[Path, FileEntry]:
    path = folder / "step_00000050" / "model.safetensors"
    path.parent.mkdir()
    path.write_bytes(content)
    return path, file_entry(path, part="model", rank=1)


def test_manifest_comes_back_from_its_text() -> None:
    assert manifest_from_json(MANIFEST.to_json(), Path("manifest.json")) == MANIFEST


@pytest.mark.parametrize("length", [0, 1, 200, len(MANIFEST.to_json()) // 2])
def test_truncated_manifest_names_the_file_and_the_remedy(length: int) -> None:
    path = Path("checkpoints/step_00000050/manifest.json")
    with pytest.raises(ValueError, match=r"step_00000050/manifest\.json is not a complete .* remove the folder step_0"):
        manifest_from_json(MANIFEST.to_json()[:length], path)


@pytest.mark.parametrize("text", ["[]", "3", "{}", '{"format": "other"}', '{"format": "aer-megatron checkpoint"}'])
def test_other_json_is_not_a_manifest(text: str) -> None:
    with pytest.raises(ValueError, match="not a complete checkpoint manifest"):
        manifest_from_json(text, Path("step_00000050/manifest.json"))


def test_missing_field_is_named() -> None:
    table = json.loads(MANIFEST.to_json())
    del table["num_updates"]
    with pytest.raises(ValueError, match="num_updates"):
        manifest_from_json(json.dumps(table), Path("manifest.json"))


def test_other_format_version_is_refused() -> None:
    table = json.loads(MANIFEST.to_json()) | {"format_version": 7}
    with pytest.raises(ValueError, match="format_version=7, this program reads 1"):
        manifest_from_json(json.dumps(table), Path("manifest.json"))


def test_entry_has_the_size_and_digest_of_the_file(tmp_path: Path) -> None:
    path, entry = _written(tmp_path)
    assert entry == FileEntry("model", 1, 7, hashlib.sha256(b"weights").hexdigest())
    check_file(path, entry)


def test_truncated_file_names_both_sizes(tmp_path: Path) -> None:
    path, entry = _written(tmp_path)
    path.write_bytes(b"weig")
    message = r"model\.safetensors has 4 bytes, expected 7; remove the folder step_00000050"
    with pytest.raises(ValueError, match=message):
        check_file(path, entry)


def test_changed_file_of_the_same_size_is_found(tmp_path: Path) -> None:
    path, entry = _written(tmp_path)
    path.write_bytes(b"weightS")
    with pytest.raises(ValueError, match=r"model\.safetensors has changed .* 7 bytes as expected"):
        check_file(path, entry)


def test_missing_file_is_named(tmp_path: Path) -> None:
    path, entry = _written(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is missing \(expected 7 bytes\)"):
        check_file(path, entry)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 2}, "num_layers is 28 there and 2 in model.path"),
        ({"family": "llama", "num_layers": 2}, "family is 'qwen3' there and 'llama' in model.path"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling is None there"),
        ({"qk_norm": True}, "qk_norm is None there and True"),
    ],
)
def test_another_model_is_refused_by_its_first_difference(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_model(MANIFEST, MODEL | change, "bf16", Path("step_00000050"))


def test_another_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match=r"holds bf16 weights, model\.dtype is 'fp32'; set model\.dtype='bf16'"):
        check_model(MANIFEST, MODEL, "fp32", Path("step_00000050"))


def test_same_model_is_accepted_whatever_its_padding_and_sequence_types() -> None:
    manifest = dataclasses.replace(MANIFEST, model=MODEL | {"sizes": [1, 2]})
    check_model(manifest, MODEL | {"sizes": (1, 2), "num_padding_groups": 3}, "bf16", Path("step_00000050"))

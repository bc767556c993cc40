"""The manifest: round trip, intact files, and refusals that name what differs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aer_megatron.checkpoint.manifest import (
    FileEntry,
    Manifest,
    TensorLayout,
    check_file,
    check_model,
    file_entry,
    manifest_from_json,
    read_manifest_text,
)
from tests.support.json_values import JSON

LAYOUT = TensorLayout(tp=2, pp=1, dp=1, padded_vocab=26, num_padding_groups=0, transformer_engine=False)
MODEL = {"family": "qwen3", "num_layers": 28, "rope_scaling": None, "num_padding_groups": 0}
MANIFEST = Manifest(
    step=50,
    num_updates=100,
    model=MODEL,
    dtype="bf16",
    layout=LAYOUT,
    versions={"torch": "2.13.0"},
    state={"controller": {"alpha": 0.1 + 0.2, "initial_entropy": None}, "cursor": {"epoch": 1}},
    files={"ledger": FileEntry(part="file", rank=0, num_bytes=3, sha256="ab" * 32)},
)


def _written(folder: Path, content: bytes = b"weights") -> tuple[Path, FileEntry]:
    path = folder / "step_00000050" / "model.safetensors"
    path.parent.mkdir()
    path.write_bytes(content)
    return path, file_entry(path, part="model", rank=1)


def sealed(without: str = "", **changes: Any) -> str:
    """The manifest's text with some of its fields changed, and a digest that fits: made on purpose, not by a fault."""
    table = json.loads(MANIFEST.to_json()) | changes
    table = {name: value for name, value in table.items() if name not in (without, "sha256")}
    text = json.dumps(table, indent=1).removesuffix("\n}")
    return f'{text},\n "sha256": "{hashlib.sha256(text.encode()).hexdigest()}"\n}}\n'


def entry(**changes: Any) -> dict[str, Any]:
    return {"files": {"ledger": {"part": "file", "rank": 0, "num_bytes": 3, "sha256": "ab" * 32} | changes}}


def layout(**changes: Any) -> dict[str, Any]:
    return {"layout": dataclasses.asdict(LAYOUT) | changes}


def test_every_flipped_bit_is_found() -> None:
    whole = MANIFEST.to_json().encode()
    for place in range(len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            with pytest.raises(ValueError, match="manifest"):
                manifest_from_json(damaged.decode("latin-1"), Path("step_00000050/manifest.json"))


def test_a_changed_manifest_says_so_with_the_remedy() -> None:
    text = MANIFEST.to_json().replace('"num_updates": 100', '"num_updates": 101')
    with pytest.raises(ValueError, match=r"manifest\.json has changed since it was .* remove the folder step_000"):
        manifest_from_json(text, Path("step_00000050/manifest.json"))


@pytest.mark.parametrize("change", ["cut", "extended", "version"])
def test_a_manifest_without_its_digest_is_refused(change: str) -> None:
    text = MANIFEST.to_json()
    table = json.loads(text)
    del table["sha256"]
    changed = {
        "cut": json.dumps(table, indent=1),
        "extended": text + " ",
        "version": json.dumps(json.loads(text) | {"format_version": 1}, indent=1),
    }
    with pytest.raises(ValueError, match="not a complete checkpoint manifest"):
        manifest_from_json(changed[change], Path("step_00000050/manifest.json"))


def test_a_manifest_of_the_first_format_is_read() -> None:
    table = json.loads(MANIFEST.to_json()) | {"format_version": 1}
    del table["sha256"]
    assert manifest_from_json(json.dumps(table, indent=1) + "\n", Path("manifest.json")) == MANIFEST


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd", "/etc/passwd", "a/b", "a\\b", "..", ".", "", ".hidden", "a\nb", "a\x00b", "ü", "a" * 300,
     "-rf", "manifest.json", "C:x"],
)  # fmt: skip
def test_a_file_outside_of_the_folder_is_refused_before_it_is_opened(name: str) -> None:
    table = {"files": {name: entry()["files"]["ledger"]}}
    with pytest.raises(ValueError, match="cannot be named"):
        manifest_from_json(sealed(**table), Path("step_00000050/manifest.json"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (entry(num_bytes=-1), "num_bytes='-1' is not a whole number"),
        (entry(num_bytes=True), "num_bytes='True' is not a whole number"),
        (entry(num_bytes=1.0), "num_bytes='1.0' is not a whole number"),
        (entry(num_bytes="3"), "is not a whole number"),
        (entry(num_bytes=1 << 63), "num_bytes="),
        (entry(rank=True), "rank='True' is not a whole number"),
        (entry(rank=-1), "rank='-1'"),
        (entry(rank=10**9), "rank=1000000000"),
        (entry(sha256="AB" * 32), "is no SHA-256"),
        (entry(sha256=None), "sha256 is of type NoneType"),
        (entry(part="pickle"), "is of part 'pickle'"),
        (entry(part=["model"]), "is of part"),
        (entry(more=1), "unexpected keyword"),
        ({"files": []}, "files is of type list"),
        ({"files": {"ledger": 3}}, "ledger is of type int"),
        (layout(tp=0), "layout.tp=0"),
        (layout(tp=True), "layout.tp='True'"),
        (layout(dp=10**9), "ranks"),
        (layout(transformer_engine=1), "layout.transformer_engine is of type int"),
        ({"layout": None}, "layout is of type NoneType"),
        ({"step": True}, "step='True'"),
        ({"step": -1}, "step='-1'"),
        ({"num_updates": 1.5}, "num_updates='1.5'"),
        ({"state": []}, "state is of type list"),
        ({"model": "x"}, "model is of type str"),
        ({"dtype": 3}, "dtype is of type int"),
        ({"format_version": True}, "format_version=True"),
        ({"surplus": 1}, "surplus"),
    ],
)
def test_what_no_checkpoint_says_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        manifest_from_json(sealed(**changes), Path("step_00000050/manifest.json"))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format": ' + "9" * 5000 + "}", "\ud800", "null", "NaN"])
def test_hostile_json_is_no_manifest(text: str) -> None:
    with pytest.raises(ValueError, match="not a complete checkpoint manifest"):
        manifest_from_json(text, Path("step_00000050/manifest.json"))


def test_a_manifest_of_any_size_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "manifest.json").open("wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(ValueError, match="more than 67108864 bytes"):
        read_manifest_text(tmp_path)


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
    with pytest.raises(ValueError, match="num_updates"):
        manifest_from_json(sealed(without="num_updates"), Path("manifest.json"))


def test_other_format_version_is_refused() -> None:
    with pytest.raises(ValueError, match="format_version=7, this program reads 2"):
        manifest_from_json(sealed(format_version=7), Path("manifest.json"))


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


def _unsealed(path: str, value: Any) -> str:
    """The manifest as the first format version wrote it, without a digest, with another value at ``path``."""
    table = json.loads(MANIFEST.to_json())
    del table["sha256"]
    node = table | {"format_version": 1}
    table = node
    *parents, leaf = path.split(".")
    for part in parents:
        node = node[part]
    node[leaf] = value
    return json.dumps(table)


FIELDS = ["step", "num_updates", "model", "dtype", "layout", "versions", "state", "files", "format", "format_version"]
FIELDS += ["layout.tp", "layout.transformer_engine", "layout.cp", "versions.torch", "files.ledger", "files.ledger.rank"]
FIELDS += ["files.ledger.part", "files.ledger.num_bytes", "files.ledger.sha256", "layout.more"]


@given(field=st.sampled_from(FIELDS), value=JSON)
def test_any_value_of_any_field_is_taken_or_refused(field: str, value: Any) -> None:
    path = Path("step_00000050/manifest.json")
    try:
        manifest = manifest_from_json(_unsealed(field, value), path)
        check_model(manifest, MODEL, "bf16", path.parent)
    except ValueError as error:
        assert "step_00000050" in str(error)
    else:
        assert type(manifest.step) is int and manifest.step >= 0
        assert isinstance(manifest.state, dict) and isinstance(manifest.model, dict)

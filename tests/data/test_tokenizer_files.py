"""A tokenizer's files that are damaged, or ask for code: a ValueError that names the folder, and no code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aer_megatron.data.tokenizer import load_tokenizer, stop_token_ids
from tests.support.json_values import JSON

MODEL = Path(__file__).resolve().parents[2] / "examples" / "quickstart" / "model"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(MODEL, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["", "1e308", "[]", '{"version"', "\ufeff{", '{"a":' * 5000])
def test_a_cut_file_is_named(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=name):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    "table",
    [{}, {"version": "1.0", "truncation": []}, {"version": "1.0", "model": {"type": "BPE"}}, {"model": 3}],
)
def test_a_file_of_another_shape_is_a_value_error(folder: Path, table: dict[str, Any]) -> None:
    (folder / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match="holds no usable tokenizer"):
        load_tokenizer(folder)


def test_the_folder_runs_no_code(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    file = folder / "tokenizer_config.json"
    table = json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    file.write_text(json.dumps(table | {"tokenizer_class": "Evil"}))
    try:
        load_tokenizer(folder)
    except ValueError as error:
        assert "holds no usable tokenizer" in str(error)
    assert not marker.exists()


KEYS = ["version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder"]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(key=st.sampled_from([*KEYS, "model"]), value=JSON)
def test_any_value_of_any_field_is_taken_or_refused(folder: Path, key: str, value: Any) -> None:
    table = json.loads((MODEL / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(table | {key: value}))
    try:
        load_tokenizer(folder)
    except ValueError as error:
        assert "tokenizer" in str(error)


@pytest.mark.parametrize("value", ["1", True, 1.5, [[1]], -1, 2**40, {"a": 1}, ["x"]])
def test_an_eos_id_is_an_integer(folder: Path, value: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id="):
        stop_token_ids(folder, load_tokenizer(folder))

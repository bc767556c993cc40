"""JSON from outside: whatever is wrong is a ValueError that names file and field."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aer_megatron.files.json_input import parse_json, read_json_object

GOOD = {"count": 3, "files": {"a": {"flag": False}}}


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "is empty"),
        (b"  \n", "is empty"),
        (b'{"a": [1', "is not valid JSON: .* column 9"),
        (b'{"a": 1,\n"b" 2}', "is not valid JSON: .* line 2, column 5"),
        (b"[1]", "must hold one JSON object, found a list"),
        (b"3", "must hold one JSON object, found an integer"),
        (b'{"a": "\xff"}', "is not valid UTF-8 at byte 8"),
        ('{"a": 1}'.encode("utf-16"), "is not valid UTF-8"),
        (b'{"a":' * 10_000, "nested too deeply"),
        (b'{"a": {"b": [0, 1' + b"0" * 5000 + b"]}}", r'"a".b\[1\] is an integer of 5001 digits \(at most 4300\)'),
        (b"[1" + b"0" * 5000 + b", " + b"[" * 100_000, "it holds an integer of more than 4300 digits"),
        (b"[1" + b"0" * 5000 + b", ", "it holds an integer of more than 4300 digits"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, raw: bytes, words: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=rf"config\.json .*{words}"):
        read_json_object(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.json", tmp_path):
        with pytest.raises(ValueError, match=rf"{path} cannot be read"):
            read_json_object(path)


def test_a_byte_order_mark_is_none_of_the_value() -> None:
    assert parse_json(b"\xef\xbb\xbf" + json.dumps(GOOD).encode()) == GOOD


@given(st.binary() | st.text())
def test_any_text_is_parsed_or_refused(text: str | bytes) -> None:
    try:
        parse_json(text)
    except ValueError as error:
        assert str(error)

"""Samples of an evaluation on disk: appended, read back, cut where a process was killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aer_megatron.evaluate.samples import SampleFile

TEXTS = {"k1": ["first", "second"], "k2": ["first"]}


def row(index: int, *, key: str = "k1", **changes: Any) -> dict[str, Any]:
    right = {"token_ids": [5, 6], "reward": 1.0, "reason": "correct", "truncated": False}
    cut = {"token_ids": [5, 7, 7], "reward": 0.0, "reason": "no_answer", "truncated": True}
    fields = {"key": key, "set": "gsm8k", "temperature": 0.6, "index": index, "id": f"{index:016x}"}
    return fields | {"samples": [right, cut], "classes": [1], "right": 0} | changes


def file(folder: Path) -> SampleFile:
    return SampleFile(folder / "a.samples.jsonl", TEXTS)


def test_appends_what_is_missing_and_nothing_twice(tmp_path):
    first = file(tmp_path)
    first.append([row(0)])
    first.append([row(0), row(1)])
    first.close()
    again = file(tmp_path)
    assert again.done == first.done and set(again.done) == {("k1", 0), ("k1", 1)}
    again.append([row(0), row(1)])
    assert len(again.path.read_text().splitlines()) == 2
    problem = again.done["k1", 1]
    assert (problem.problem, problem.samples, problem.correct, problem.truncated, problem.tokens) == (
        "second",
        2,
        1,
        1,
        5,
    )


def test_samples_of_other_options_stay_and_are_not_counted(tmp_path):
    held = file(tmp_path)
    held.append([row(0), row(0, key="k2")])
    held.append([row(0, key="other")])
    held.append([row(7)])  # beyond the set's problems
    assert set(file(tmp_path).done) == {("k1", 0), ("k2", 0)}


def test_half_a_line_is_cut_off_and_made_anew(tmp_path):
    held = file(tmp_path)
    held.append([row(0), row(1)])
    whole = held.path.read_bytes()
    held.path.write_bytes(whole[:-10])
    again = file(tmp_path)
    assert set(again.done) == {("k1", 0)}
    again.append([row(0), row(1)])
    assert again.path.read_bytes() == whole


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("nonsense", "line 2 is not valid JSON"),
        ("[1]", "line 2 is none of an evaluation"),
        (json.dumps(row(1, id="../x")), "line 2 is none of an evaluation: id"),
        (json.dumps(row(1, samples=[])), "line 2 is none of an evaluation: samples"),
        (json.dumps(row(1, right=3)), "line 2 is none of an evaluation"),
        (json.dumps(row(0)), "holds problem 0 of gsm8k twice"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, line, words):
    held = file(tmp_path)
    held.append([row(0)])
    held.path.write_text(held.path.read_text() + line + "\n" + json.dumps(row(1)) + "\n")
    with pytest.raises(ValueError) as caught:
        file(tmp_path)
    assert words in str(caught.value)

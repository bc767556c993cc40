"""What is written reads as the same records, whatever the file that they came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aer_megatron.prepare_data.problems import BadRow, read_problems, write_problems
from tests.support.json_values import JSON

TEXT = st.text(min_size=1, max_size=12)
USER = st.fixed_dictionaries({"role": st.just("user"), "content": TEXT})
SYSTEM = st.fixed_dictionaries({"role": st.just("system"), "content": TEXT})
ROW = st.fixed_dictionaries(
    {"prompt": TEXT | st.tuples(USER).map(list) | st.tuples(SYSTEM, USER).map(list)},
    optional={
        "answer": TEXT | st.integers() | st.floats(),
        "label": TEXT,
        "reward_model": st.fixed_dictionaries({"ground_truth": TEXT, "style": st.just("rule")}),
        "id": st.integers(0, 2**64 - 1) | TEXT,
        "verifier": st.sampled_from(["math", "math_verify"]),
        "response": TEXT,
        "extra": JSON,
    },
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(row=ROW)
def test_records_survive_being_written(tmp_path: Path, row: dict[str, Any]) -> None:
    source, copy = tmp_path / "source.jsonl", tmp_path / "copy.jsonl"
    source.write_text(json.dumps(row) + "\n" + json.dumps({"problem": "p", "answer": "1"}) + "\n")
    given_file = read_problems(source, "math")
    write_problems(copy, given_file.problems, "math")
    again = read_problems(copy, "math")
    assert not again.bad
    assert repr([problem.record for problem in again.problems]) == repr(
        [problem.record for problem in given_file.problems]
    )


def test_a_file_without_a_record_says_what_is_bad(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text("{}\n[]\n")
    with pytest.raises(ValueError, match=r"holds no record; the first of 2 bad rows, line 1: "):
        read_problems(path, "math")
    path.write_text('{}\n{"problem": "p", "answer": "1"}\n')
    assert [type(item) for item in read_problems(path, "math").bad] == [BadRow]


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text('{"problem": "p", "answer": "1"}\n')
    problems = read_problems(path, "math").problems
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(ValueError, match="cannot be written"):
        write_problems(tmp_path / "folder.jsonl", problems, "math")
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["folder.jsonl", "set.jsonl"]

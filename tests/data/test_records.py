"""What a row may hold: this project's fields, verl's and slime's files as they are, and values that are no JSON."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aer_megatron.data import rows
from aer_megatron.data.records import Message, Record, Rules, parse_record, stable_id
from aer_megatron.data.sources import load_records
from aer_megatron.options.data import SourceSection
from aer_megatron.rewards.messages import encode_prompt
from aer_megatron.types import Prompt
from tests.support.json_values import JSON

CASES = Path(__file__).resolve().parents[3] / "shared" / "cases" / "data"
RULES = Rules("answer", "math", lambda name: False)
USER = {"role": "user", "content": "What is 1+1?"}
SYSTEM = {"role": "system", "content": "Be brief."}
VERL = {
    "data_source": "math_dapo",
    "prompt": [USER],
    "ability": "MATH",
    "reward_model": {"style": "rule", "ground_truth": "2"},
    "extra_info": {"index": 3, "split": None},
}
SLIME = {"prompt": [USER], "label": "2", "metadata": {"rm_type": "math"}}


def load(path: Path, on_bad_record: Any = "error") -> tuple[Record, ...]:
    source = SourceSection(path=str(path))
    return load_records(
        source, on_bad_record=on_bad_record, default_verifier="math", may_name=lambda name: False
    ).records


@pytest.mark.parametrize("row", [VERL, SLIME, SLIME | {"prompt": USER["content"]}, SLIME | {"label": 2}])
@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_files_of_verl_and_slime_are_read_as_they_are(tmp_path: Path, row: dict[str, Any], suffix: str) -> None:
    path = tmp_path / f"set.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist([row]), path)
    else:
        path.write_text(json.dumps(row) + "\n")
    (record,) = load(path)
    assert (record.problem, record.answer, record.verifier) == ("What is 1+1?", "2", "math")
    assert record.prompt == record.problem  # one message of a user is its text
    assert record.id == stable_id("What is 1+1?", "2")
    assert record.metadata == {key: row[key] for key in row if key not in ("prompt", "label")}


def test_a_conversation_is_kept_and_is_another_problem() -> None:
    messages = [SYSTEM, USER, {"role": "assistant", "content": "3"}, {"role": "user", "content": "No."}]
    record = parse_record({"prompt": messages, "answer": 2}, RULES)
    assert record.problem == "No."
    assert record.prompt == record.conversation == tuple(Message(m["role"], m["content"]) for m in messages)
    ids = {parse_record({"prompt": part, "answer": 2}, RULES).id for part in (messages, messages[1:], messages[-1:])}
    assert len(ids) == 3 and stable_id("No.", "2") in ids


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": [], "answer": 1}, "a list of 0 messages"),
        ({"prompt": [USER] * 1001, "answer": 1}, "a list of 1001 messages"),
        ({"prompt": ["x"], "answer": 1}, '"prompt"[0] must be a message'),
        ({"prompt": [{"role": "user"}], "answer": 1}, 'must have "role" and "content"'),
        ({"prompt": [USER | {"tool_calls": [1]}], "answer": 1}, "'tool_calls'"),
        ({"prompt": [USER | {"content": [{"type": "text"}]}], "answer": 1}, '"prompt"[0]."content" must be text'),
        ({"prompt": [USER | {"content": " "}], "answer": 1}, '"prompt"[0]."content" is empty'),
        ({"prompt": [USER | {"role": "tool"}], "answer": 1}, "it is 'tool'"),
        ({"prompt": [USER | {"role": ["user"]}], "answer": 1}, "it is ['user']"),
        ({"prompt": [USER, SYSTEM], "answer": 1}, "a system message that is not the first"),
        ({"prompt": [USER, {"role": "assistant", "content": "x"}], "answer": 1}, "ends in a message of 'assistant'"),
        ({"problem": "x", "reward_model": {"ground_truth": ["1", "2"]}}, '"ground_truth" must be text, it is a list'),
        ({"problem": "x", "reward_model": {"style": "rule"}}, '"answer" (or "reward_model"'),
        ({"problem": "x", "reward_model": "1"}, '"answer" (or "reward_model"'),
        ({"problem": "x", "label": True}, '"label" must be text, it is true/false'),
        ({"problem": "x", "label": "1", "reward_model": {"ground_truth": "2"}}, "are two answers"),
        ({"problem": "x", "answer": 1, "image": b"png"}, '"image" holds a bytes, which JSON has not'),
        ({"problem": "x", "answer": 1, "m": [{"at": datetime.date(2026, 1, 1)}]}, '"m" holds a date'),
        ({"problem": "x", "answer": 1, "m": json.loads("[" * 40 + "]" * 40)}, '"m" is nested deeper than 32'),
    ],
)
def test_what_makes_a_record_bad(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_record(row, RULES)
    assert reason in str(caught.value)


def test_an_answer_of_its_own_leaves_a_label_alone() -> None:
    record = parse_record({"problem": "x", "answer": "1", "label": [0.5], "reward_model": {"ground_truth": "2"}}, RULES)
    assert (record.answer, record.metadata["label"]) == ("1", [0.5])
    supervised = parse_record(
        {"problem": "x", "response": "y", "label": True}, Rules("response", "", lambda name: True)
    )
    assert (supervised.answer, supervised.metadata) == ("", {"label": True})


def test_a_line_without_end_is_one_bad_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_ROW_BYTES", 100)
    good = '{"problem": "x", "answer": "1"}\n'
    path = tmp_path / "set.jsonl"
    path.write_text(good + '{"problem": "' + "y" * 1000 + '", "answer": "1"}\n' + good.replace("x", "z") + "w" * 500)
    with pytest.raises(ValueError, match="line 2: it has more than 100 bytes"):
        load(path)
    assert [record.problem for record in load(path, "skip")] == ["x", "z"]


def test_a_value_of_parquet_that_python_cannot_hold_costs_its_row(tmp_path: Path) -> None:
    broken = pa.array([b"1", b"\xff", b"3"]).view(pa.string())
    path = tmp_path / "set.parquet"
    pq.write_table(pa.table({"problem": ["a", "b", "c"], "answer": broken}), path)
    with pytest.raises(ValueError, match=r"set\.parquet, row 2: it holds a value that cannot be read: 'utf-8'"):
        load(path)
    assert [record.answer for record in load(path, "skip")] == ["1", "3"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, 1499), st.integers(0, 255)), min_size=1, max_size=8))
def test_a_damaged_parquet_file_is_named(tmp_path: Path, edits: list[tuple[int, int]]) -> None:
    path = tmp_path / "set.parquet"
    pq.write_table(pa.Table.from_pylist([VERL, VERL | {"reward_model": {"style": "rule", "ground_truth": "3"}}]), path)
    raw = bytearray(path.read_bytes())
    for from_the_end, value in edits:
        raw[-1 - from_the_end] = value
    path.write_bytes(bytes(raw))
    try:
        load(path, "skip")
    except ValueError as error:
        assert str(path) in str(error)


def test_parquet_whose_columns_have_no_name_in_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "set.parquet"
    pq.write_table(pa.table({"problem": ["x"], "answer": ["1"], "extra": ["y"]}), path)
    path.write_bytes(path.read_bytes().replace(b"extra", b"extr\xff"))
    with pytest.raises(ValueError, match=r"set\.parquet' is not a readable Parquet file"):
        load(path, "skip")


def test_parquet_whose_rows_unpack_to_too_much_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_MAX_BATCH_BYTES", 10_000)
    path = tmp_path / "set.parquet"
    pq.write_table(pa.table({"problem": ["x" * 1000] * 100, "answer": ["1"] * 100}), path)
    assert path.stat().st_size < 10_000
    with pytest.raises(ValueError, match=r"row 1: this row and those behind it are too large"):
        load(path, "skip")


FIELDS = ["problem", "prompt", "answer", "label", "reward_model", "verifier", "id", "response", "extra"]
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "x"]), "content": JSON}), max_size=3
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), JSON | MESSAGES | st.just({"ground_truth": "2"}), max_size=6) | JSON)
def test_any_row_is_a_record_or_a_value_error(row: Any) -> None:
    try:
        record = parse_record(row, RULES)
    except ValueError as error:
        assert str(error)
        return
    prompt = Prompt(record.id, record.problem, (1,), record.answer, record.verifier, record.metadata)
    assert encode_prompt(prompt)  # it reaches a verifier process
    assert 0 <= record.id < 2**64 and record.problem.strip() and record.answer.strip()


@pytest.mark.skipif(not CASES.is_dir(), reason="no ../shared/cases beside the project")
@pytest.mark.parametrize(
    ("name", "answers"),
    [("bom", ["2", "3"]), ("nan_answer", ["3"]), ("small_float", ["0.00001"]), ("verl", ["2"])],
)
def test_the_shared_cases(name: str, answers: list[str]) -> None:
    assert [record.answer for record in load(CASES / f"{name}.jsonl", "skip")] == answers

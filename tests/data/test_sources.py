from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aer_megatron.data.records import Record, stable_id
from aer_megatron.data.sources import LoadedRecords, load_records, load_supervised_records
from aer_megatron.options.data import SourceSection
from aer_megatron.rewards.reasoning_gym import ReasoningGymVerifier
from aer_megatron.rewards.registry import is_built_in
from aer_megatron.types import Prompt, Verdict

B2SUM_OF_EXAMPLE = "0fd6b5134a8c37de"
GOOD = '{"problem": "1+1", "answer": "2"}'


def write(folder: Path, lines: Sequence[str | bytes], name: str = "set.jsonl") -> Path:
    path = folder / name
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines) + b"\n")
    return path


def may_name(name: str) -> bool:
    return is_built_in(name) or name == "pkg.mod:f"


def load(path: Path, on_bad_record: Any = "error") -> LoadedRecords:
    source = SourceSection(path=str(path))
    return load_records(source, on_bad_record=on_bad_record, default_verifier="math", may_name=may_name)


def test_fields_of_a_record(tmp_path: Path) -> None:
    lines = [
        GOOD,
        "",
        '{"prompt": "2+2", "answer": 4, "id": 17, "verifier": "pkg.mod:f", "response": "four", "level": 3}',
        '{"problem": "a\u2028b", "answer": 0.5, "id": "text-id", "response": null}',
    ]
    records, num_skipped = load(write(tmp_path, lines))
    assert num_skipped == 0
    assert records[0] == Record(stable_id("1+1", "2"), "1+1", "2", "math", None, {})
    assert records[1] == Record(17, "2+2", "4", "pkg.mod:f", "four", {"level": 3})
    assert records[2] == Record(stable_id("text-id"), "a\u2028b", "0.5", "math", None, {})


def test_ids_are_those_of_every_run_and_machine() -> None:
    # BLAKE2b-64 over (length as 8 little-endian bytes, UTF-8) of each part, from b2sum's own implementation:
    # printf '\x03\0\0\0\0\0\0\x001+1\x01\0\0\0\0\0\0\x002' | b2sum -l 64, read as little endian
    assert stable_id("1+1", "2") == int.from_bytes(bytes.fromhex(B2SUM_OF_EXAMPLE), "little")
    assert stable_id("ab", "c") != stable_id("a", "bc")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"problem": "x", "answer": ', "not valid JSON"),
        (b'{"problem": "\xff", "answer": "1"}', "not valid UTF-8"),
        ('["x", "1"]', "a record must be an object, this is a list"),
        ('{"answer": "1"}', '"problem" (or "prompt") is missing'),
        ('{"problem": "x"}', '"answer" (or "reward_model"."ground_truth", or "label") is missing'),
        ('{"problem": "x", "prompt": "y", "answer": "1"}', "not both"),
        ('{"problem": "  ", "answer": "1"}', '"problem" is empty'),
        ('{"problem": "x", "answer": true}', '"answer" must be text'),
        ('{"problem": "x", "answer": "1", "id": -1}', "outside 0 .. 2^64 - 1"),
        ('{"problem": "x", "answer": "1", "id": 18446744073709551616}', "outside 0 .. 2^64 - 1"),
        ('{"problem": "x", "answer": "1", "id": 1.5}', '"id" must be a whole number'),
        ('{"problem": "x", "answer": "1", "id": true}', '"id" must be a whole number'),
        ('{"problem": "x\\ud800", "answer": "1"}', "lone surrogate"),
        ('{"problem": "x", "answer": "1", "verifier": 3}', '"verifier" must be text'),
        ("[" * 100_000, "nested too deeply"),
        ('{"problem": "x", "answer": NaN}', '"answer"=nan is no number'),
        ('{"problem": "x", "answer": 1e999}', '"answer"=inf is no number'),
        ('{"problem": "x", "answer": -Infinity}', '"answer"=-inf is no number'),
        (f'{{"problem": "x", "answer": 1{"0" * 5000}}}', '"answer" is an integer of 5001 digits (at most 4300)'),
        (f'{{"problem": "x", "answer": 1, "m": [{{"k": 1{"0" * 4300}}}]}}', '"m"[0].k is an integer of 4301 digits'),
        ('{"problem": "x", "answer": "1", "verifier": "shutil:rmtree"}', "\"verifier\"='shutil:rmtree' is neither"),
        ('{"problem": "x", "answer": "1", "verifier": "pkg.mod:g"}', "nor listed in data.verifiers"),
        ('{"problem": "x", "answer": "1", "verifier": "reasoning_gym:../x"}', "is neither built in"),
        ('{"problem": "x", "answer": "1", "verifier": "builtins:eval"}', "cannot name code by itself"),
    ],
)
def test_malformed_lines_name_file_line_and_reason(tmp_path: Path, line: str | bytes, reason: str) -> None:
    path = write(tmp_path, [GOOD, "", line, GOOD])
    with pytest.raises(ValueError) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert "line 3:" in str(caught.value)
    assert reason in str(caught.value)
    assert "on_bad_record='skip'" in str(caught.value)
    records, num_skipped = load(path, "skip")
    assert (len(records), num_skipped) == (2, 1)


@pytest.mark.parametrize("name", ["math", "countdown", "reasoning_gym:chain_sum", "pkg.mod:f"])
def test_a_record_may_name_what_is_built_in_or_listed(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, [json.dumps({"problem": "x", "answer": "1", "verifier": name})])
    assert load(path).records[0].verifier == name


def test_the_default_verifier_may_be_named_by_a_record_and_supervised_data_run_none(tmp_path: Path) -> None:
    path = write(tmp_path, [json.dumps({"problem": "x", "answer": "1", "verifier": "mine:f", "response": "y"})])
    source = SourceSection(path=str(path))
    found = load_records(source, on_bad_record="error", default_verifier="mine:f", may_name=lambda name: False)
    assert found.records[0].verifier == "mine:f"
    assert len(load_supervised_records(source, on_bad_record="error").records) == 1


@pytest.mark.parametrize("on_bad_record", ["error", "skip"])
def test_a_byte_order_mark_loses_no_record(tmp_path: Path, on_bad_record: str) -> None:
    path = write(tmp_path, [b"\xef\xbb\xbf" + GOOD.encode(), '{"problem": "p", "answer": "3"}'])
    records, num_skipped = load(path, on_bad_record)
    assert ([record.answer for record in records], num_skipped) == (["2", "3"], 0)


@pytest.mark.parametrize(
    ("number", "digits"),
    [
        ("1e-05", "0.00001"),
        ("1e16", "10000000000000000"),
        ("1.5e22", "15000000000000000000000"),
        ("-2.5e-7", "-0.00000025"),
        ("0.1", "0.1"),
        ("7", "7"),
        ("-0.0", "-0.0"),
    ],
)
def test_a_number_as_answer_is_spelled_in_digits(tmp_path: Path, number: str, digits: str) -> None:
    path = write(tmp_path, [f'{{"problem": "x", "answer": {number}}}'])
    assert load(path).records[0].answer == digits


def test_one_id_for_two_problems_is_bad(tmp_path: Path) -> None:
    path = write(tmp_path, ['{"problem": "a", "answer": "1", "id": 5}', '{"problem": "b", "answer": "1", "id": 5}'])
    with pytest.raises(ValueError, match=r"line 2: .*another problem at line 1"):
        load(path)


@pytest.mark.parametrize(("lines", "detail"), [([], "empty"), (["", " "], "empty"), (["{", "{"], "all 2 are bad")])
def test_empty_data(tmp_path: Path, lines: list[str], detail: str) -> None:
    with pytest.raises(ValueError, match=rf"set\.jsonl.*no records.*{detail}"):
        load(write(tmp_path, lines), "skip")


def test_missing_and_unknown_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.jsonl' is not a file"):
        load(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match=r"'\.csv'; known are"):
        load(write(tmp_path, [GOOD], "set.csv"))


def test_parquet_equals_jsonl(tmp_path: Path) -> None:
    rows = [
        {"problem": "1+1", "answer": "2", "id": None, "level": 1},
        {"problem": "2+2", "answer": "4", "id": 9, "level": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "set.parquet")
    jsonl = write(tmp_path, [json.dumps(row) for row in rows])
    assert load(tmp_path / "set.parquet") == load(jsonl)


def test_bad_parquet(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        load(write(tmp_path, ["no parquet"], "set.parquet"))
    pq.write_table(
        pa.Table.from_pylist([{"problem": "x", "answer": "1"}, {"problem": None, "answer": "1"}]),
        tmp_path / "rows.parquet",
    )
    with pytest.raises(ValueError, match=r"rows\.parquet, row 2: .*missing"):
        load(tmp_path / "rows.parquet")


def test_supervised_files_need_a_response_and_no_answer(tmp_path: Path) -> None:
    path = write(tmp_path, ['{"problem": "p", "response": "r"}', GOOD])
    with pytest.raises(ValueError, match=r'line 2: "response" is missing'):
        load_supervised_records(SourceSection(path=str(path)), on_bad_record="error")
    records, num_skipped = load_supervised_records(SourceSection(path=str(path)), on_bad_record="skip")
    assert (records[0].response, num_skipped) == ("r", 1)
    with pytest.raises(ValueError, match="cannot answer itself"):
        load_supervised_records(SourceSection(task="reasoning_gym:gcd"), on_bad_record="error")


def procedural(task: str, **fields: Any) -> LoadedRecords:
    source = SourceSection(task=task, **fields)
    return load_records(source, on_bad_record="error", default_verifier="math", may_name=may_name)


def test_reasoning_gym_records_score_their_own_answer() -> None:
    options = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}
    records, num_skipped = procedural("reasoning_gym:chain_sum", size=20, seed=3, options=options)
    assert (len(records), num_skipped) == (20, 0)
    assert records == procedural("reasoning_gym:chain_sum", size=20, seed=3, options=options).records
    assert records != procedural("reasoning_gym:chain_sum", size=20, seed=4, options=options).records
    verify = ReasoningGymVerifier("chain_sum")
    for record in records:
        assert record.verifier == "reasoning_gym:chain_sum"
        prompt = Prompt(record.id, record.problem, (1,), record.answer, record.verifier, record.metadata)
        assert verify(record.answer, prompt) == Verdict(1.0, "correct")
        assert verify(record.answer + "1", prompt) == Verdict(0.0, "wrong")


@pytest.mark.parametrize(
    ("task", "options", "words"),
    [
        ("sudoku", {}, "use 'countdown' or 'reasoning_gym:NAME'"),
        ("reasoning_gym:", {}, "is unknown"),
        ("reasoning_gym:chain_summ", {}, "reasoning-gym has .*chain_sum"),
        ("reasoning_gym:chain_sum", {"min_word": 1}, "do not suit"),
        ("reasoning_gym:chain_sum", {"min_terms": 9, "max_terms": 2}, "do not suit"),
        ("reasoning_gym:game_of_life_halting", {}, "scores any text as 1"),
        ("reasoning_gym:propositional_logic", {}, "does not score its own answer"),
        ("countdown", {}, "split='train' or split='eval'"),
        ("countdown", {"split": "test"}, "split='train' or split='eval'"),
        ("countdown", {"split": "train", "numbers": 5}, "exactly"),
    ],
)
def test_unusable_tasks(task: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        procedural(task, size=5, options=options)

"""Faults that are planted in a file: each is found, and the records without one are written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aer_megatron.data.sources import load_records
from aer_megatron.options.data import SourceSection
from aer_megatron.prepare_data.command import main

ROWS: list[Any] = [
    {"problem": "What is $1+1$?", "answer": "2", "level": 3},
    {"problem": "what is  1+1 ?", "answer": "2"},  # a duplicate
    {"problem": "Half of one?", "answer": r"\frac{1}{2}"},
    {"problem": "half of one?", "answer": "0.5"},  # a duplicate: another spelling of the answer
    {"problem": "How many primes?", "answer": "0"},
    {"problem": r"How many\ primes?", "answer": "1"},  # another answer
    {"problem": "Why?", "answer": "because (of"},
    {"problem": "Broken?", "answer": r"\frac{1}{"},  # no box can hold it
    {"problem": "no answer"},
    {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "Talk."}], "answer": 5, "id": "t"},
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def load(path: str) -> Any:
    return load_records(
        SourceSection(path=path), on_bad_record="skip", default_verifier="math", may_name=lambda name: False
    ).records


@pytest.mark.processes
def test_planted_faults(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "set.jsonl", "--output", "clean.jsonl", "--json", "report.json"]) == 0
    found = json.loads(Path("report.json").read_text())["files"]["set.jsonl"]
    wheres = [[item["where"] for item in group] for group in found["duplicates"]]
    assert wheres == [["line 1", "line 2"], ["line 3", "line 4"]]
    assert [[item["where"] for item in group] for group in found["several_answers"]] == [["line 5", "line 6"]]
    assert [(item["where"], item["reason"]) for item in found["not_judged"]] == [("line 8", "no_answer")]
    assert [item["where"] for item in found["bad_rows"]] == ["line 9"]
    assert (found["records"], found["without_fault"]) == (9, 4)
    kept = load("clean.jsonl")
    assert [record for record in load("set.jsonl") if record in kept] == list(kept)
    assert [record.problem for record in kept] == ["What is $1+1$?", "Half of one?", "Why?", "Talk."]
    assert (kept[0].metadata, len(kept[3].conversation)) == ({"level": 3}, 2)
    shown = capsys.readouterr().out
    assert "one problem, several answers" in shown and "gold answers" in shown


@pytest.mark.processes
def test_a_verifier_of_the_users_own_judges_the_bare_answer(folder: Path) -> None:
    Path("set.jsonl").write_text('{"problem": "p", "answer": "yes"}\n{"problem": "q", "answer": "no"}\n')
    name = "tests.prepare_data.test_check:only_yes"
    assert main(["check", "set.jsonl", "--verifier", name, "--json", "report.json", "--timeout", "20"]) == 0
    found = json.loads(Path("report.json").read_text())["files"]["set.jsonl"]
    assert [(item["answer"], item["reason"]) for item in found["not_judged"]] == [("no", "wrong")]


def only_yes(text: str, prompt: object) -> bool:
    return text == "yes"


def test_what_cannot_be_checked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty.jsonl").write_text("\n")
    Path("evil.jsonl").write_text('{"problem": "p", "answer": "1", "verifier": "os:system"}\n')
    for arguments, words in [
        (["check", "absent.jsonl"], "is not a file"),
        (["check", "empty.jsonl"], "empty.jsonl holds no record"),
        (["check", "evil.jsonl"], "cannot name code by itself"),
        (["check", "set.jsonl", "--verifier", "mat"], "verifier 'mat' is unknown"),
        (["check", "set.jsonl", "--share", "0.5"], "--share is no option of aer data check"),
        (["check", "set.jsonl", "--timeout", "0"], "must be a number of seconds above 0"),
        (["check", "set.jsonl", "--output", "set.jsonl"], "set.jsonl is read or written already"),
        (["check", "set.jsonl", "--output", "a.jsonl", "--json", "./a.jsonl"], "is read or written already"),
        (["check", "set.jsonl", "empty.jsonl", "--output", "a.jsonl"], "holds no record"),
        (["chek", "set.jsonl"], "chek is no form of aer data; use fetch, check, decontaminate"),
    ]:
        assert main(arguments) == 2, arguments
        assert words in capsys.readouterr().err

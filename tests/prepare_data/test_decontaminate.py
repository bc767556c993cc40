"""Evaluation problems in a training set: exact ones, reworded ones, and boilerplate, which is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aer_megatron.prepare_data.command import main
from aer_megatron.prepare_data.normal_form import essence, words

LONG = (
    "A strictly increasing sequence of positive integers $a_1$, $a_2$, $a_3$ has the property that for every positive "
    "integer $k$ the subsequence is geometric. Suppose that $a_{13} = 2016$. "
)
BOILERPLATE = (
    r"The value can be written as $\frac{m}{n}$, where $m$ and $n$ are relatively prime positive integers. Find $m+n$. "
)
CIRCLE = (
    "A circle of radius seven rolls without slipping along the inside of another one whose radius is three times as "
    "large, until it has come back to the point where it began, and a red dot on its rim draws a closed curve. "
)
EVALUATION = [LONG + "Find $a_1$.", "What is $1 + 1$?", CIRCLE + BOILERPLATE]
TRAIN = [
    ("identical", EVALUATION[0], 1.0),
    ("exact", r"what is 1+1 ?", 1.0),
    ("ngram", LONG.replace("$", "") + "What is the first of them?", 0.9),
    (None, "A square of side three turns. " * 3 + BOILERPLATE, 0.0),
    (None, "What is 1 + 2?", 0.0),
    ("ngram", "What is (1 1)?", 1.0),  # all words of a short one
    (None, "What is 1 + 1 times 5?", 0.0),  # more than the words of a short one
]


def write(path: str, problems: list[str]) -> None:
    Path(path).write_text("".join(json.dumps({"problem": text, "answer": "1"}) + "\n" for text in problems))


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write("eval.jsonl", EVALUATION)
    write("train.jsonl", [text for _, text, _ in TRAIN])
    return tmp_path


def decontaminate(*arguments: str) -> Any:
    command = ["decontaminate", "train.jsonl", "--against", "eval.jsonl", "--json", "report.json", *arguments]
    assert main(command) == 0
    return json.loads(Path("report.json").read_text())


def test_hits_are_listed_with_both_texts_and_left_out(files: Path) -> None:
    report = decontaminate("--output", "clean.jsonl", "--hits", "hits.jsonl")
    hits = [json.loads(line) for line in Path("hits.jsonl").read_text().splitlines()]
    assert hits == report["hits"]
    expected = {text: (kind, share) for kind, text, share in TRAIN if kind}
    assert {hit["train"]["problem"]: hit["kind"] for hit in hits} == {
        text: kind for text, (kind, _) in expected.items()
    }
    assert all(hit["share"] >= expected[hit["train"]["problem"]][1] - 0.1 for hit in hits if hit["kind"] != "exact")
    assert [hit["evaluation"]["where"] for hit in hits] == ["line 1", "line 2", "line 1", "line 2"]
    kept = [json.loads(line)["problem"] for line in Path("clean.jsonl").read_text().splitlines()]
    assert kept == [text for kind, text, _ in TRAIN if kind is None]
    assert (report["records"], report["kept"]) == (7, 3)


def test_how_alike_is_a_choice(files: Path) -> None:
    assert {hit["kind"] for hit in decontaminate("--share", "1", "--ngram", "50")["hits"]} == {
        "identical",
        "exact",
        "ngram",
    }
    boilerplate = [hit for hit in decontaminate("--share", "0.01")["hits"] if "square" in hit["train"]["problem"]]
    assert [hit["evaluation"]["where"] for hit in boilerplate] == ["line 3"]
    assert 0.01 < boilerplate[0]["share"] < 0.3


def test_several_evaluation_sets_and_the_one_that_is_hit(files: Path) -> None:
    write("other.jsonl", ["How old is the captain?"])
    write("train.jsonl", ["How old is the captain?", "Nothing alike."])
    assert [hit["against"] for hit in decontaminate("--against", "other.jsonl")["hits"]] == ["other.jsonl"]


def test_problems_do_nothing_to_the_terminal(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "[red]x[/red] \x1b[2J\x1b]0;title\x07 \u202eevil\u2066 [link=http://x]y[/link] " + LONG
    write("train.jsonl", [evil])
    decontaminate()
    shown = capsys.readouterr().out
    assert not {"\x1b", "\x07", "\u202e", "\u2066"} & set(shown)
    assert "[red]x[/red]" in shown


def test_normal_forms() -> None:
    assert essence(r"Let $\left( x \right)$ be  $ 1 $.") == essence("let (X) be 1")
    assert essence("x = 12") != essence("x = 13")
    assert words("The ﬁrst $x_{12}$ isn't 3.5 \\frac12!") == ["the", "first", "x", "12", "isn", "t", "3", "5", "frac12"]


def test_what_cannot_be_done(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in [
        (["decontaminate", "train.jsonl"], "--against is missing"),
        (["decontaminate", "train.jsonl", "eval.jsonl", "--against", "eval.jsonl"], "takes one TRAIN"),
        (["decontaminate", "train.jsonl", "--against", "eval.jsonl", "--output", "eval.jsonl"], "is read or written"),
        (["decontaminate", "train.jsonl", "--against", "eval.jsonl", "--output", "clean.txt"], "must end in .jsonl"),
        (["decontaminate", "train.jsonl", "--against", "eval.jsonl", "--share", "0"], "above 0 and at most 1"),
        (["decontaminate", "train.jsonl", "--against", "eval.jsonl", "--ngram", "0"], "must be at least 1"),
    ]:
        assert main(arguments) == 2, arguments
        assert said in capsys.readouterr().err

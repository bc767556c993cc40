"""aer samples: which samples it shows, in which form, and that their text does nothing to the terminal."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from aer_megatron.report.samples import Sample, SampleWriter
from aer_megatron.rewards.pool import Job, VerifierPool
from aer_megatron.samples import selection
from aer_megatron.samples.command import main
from aer_megatron.samples.view import legend, sample_text
from aer_megatron.types import Prompt

HOSTILE = "\x1b[2J\x1b]0;title\x07 \u202egnorw [bold red]loud[/] :bomb:\rstep 9 · train"
EVALUATED: dict[str, Any] = {
    "set": "aime24", "advantage": None, "difficulty": None, "entropy_weight": None, "token_entropy": None,
}  # fmt: skip


def sample(step: int, completion: str, **given: Any) -> Sample:
    """A right answer of one token; its entropy is 0.25 nats."""
    plain: dict[str, Any] = {
        "set": "train", "prompt_id": 0x9AE1, "group": 0, "prompt": "What is 6 * 7?", "answer": "42",
        "token_ids": (5,), "sampled": None, "token_ends": (len(completion),), "reward": 1.0, "reason": "correct",
        "advantage": 0.5, "difficulty": 0.25, "entropy_weight": 1e-3, "logprob": (-0.5,), "token_entropy": (0.25,),
        "policy_version_min": step, "policy_version_max": step, "truncated": False,
    }  # fmt: skip
    return Sample(step=step, completion=completion, **{**plain, **given})


WRONG = {"reward": 0.0, "reason": "wrong"}
ROWS = [
    sample(0, r"first \boxed{42}", group=0),
    sample(0, r"second \boxed{41}", group=0, **WRONG),
    sample(0, r"third \boxed{1}", group=1, prompt_id=7, **WRONG),
    sample(1, r"fourth \boxed{1}", group=0, token_entropy=(1.5,), **WRONG),
    sample(1, "fifth\nbox: none", group=1, prompt_id=7, reward=0.0, reason="no_answer", truncated=True),
    sample(1, "sixth", **EVALUATED),
]
WORDS = ("first", "second", "third", "fourth", "fifth", "sixth")


def run_with(folder: Path, rows: list[Sample]) -> Path:
    with SampleWriter(folder, rank=0) as writer:
        writer.write(lambda: rows)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return run_with(tmp_path, ROWS)


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ((), WORDS),
        (("--step=0",), ("first", "second", "third")),
        (("--step", "1-7"), ("fourth", "fifth", "sixth")),
        (("--set=aime24",), ("sixth",)),
        (("--set=aime24", "--set=train", "--step=1"), ("fourth", "fifth", "sixth")),
        (("--reason=no_answer", "--reason=wrong"), ("second", "third", "fourth", "fifth")),
        (("--unsolved",), ("third", "fourth", "fifth")),
        (("--unsolved", "--reason=wrong", "--step=1"), ("fourth",)),
        (("--grep", r"\\boxed\{4.\}"), ("first", "second")),
        (("--grep", "^box.*none$"), ("fifth",)),
        (("--most-entropy", "--limit=1"), ("fourth",)),
        (("--limit=2",), ("fourth", "fifth")),
        (("--reason=odd",), ()),
    ],
)
def test_what_is_shown(
    run: Path, options: tuple[str, ...], shown: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run), *options]) == 0
    said = capsys.readouterr().out
    assert tuple(word for word in WORDS if f"│ {word}" in said) == shown
    assert ("no sample matches" in said) == (not shown)


def test_a_sample_without_colours(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--reason=no_answer"]) == 0
    assert capsys.readouterr().out == (
        "step 1 · train · prompt 0000000000000007 · reward 0 · no_answer · advantage 0.5 · difficulty 0.25 · "
        "entropy weight 0.001 · policy 1 · truncated\n"
        "prompt\n│ What is 6 * 7?\nexpected answer\n│ 42\n"
        "completion (tokens 1, mean entropy 0.250 nats)\n│ fifth\n│ box: none\n\n"
        "matching samples 1: no_answer 1\n"
    )


def test_the_last_line_counts_what_is_not_shown(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--set=train", "--limit=1"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "matching samples 5: wrong 3, correct 1, no_answer 1; these are the 1 newest (--limit)"


@pytest.mark.processes
def test_a_planted_reward_hack_is_on_the_first_screen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "tests.support.bad_verifiers:accepts_an_empty_box"
    prompt = Prompt(0x9AE1, "What is 6 * 7?", (1,), "42", name)
    texts = [r"so \boxed{41}"] * 20 + [r"so \boxed{41}", r"\boxed{}"] * 10
    with VerifierPool(num_workers=1, timeout_s=30.0) as pool:
        verdicts = pool.verify([Job(name, text, prompt) for text in texts])
    rows = [
        sample(step, text, reward=verdict.reward, reason=verdict.reason)
        for step, (text, verdict) in enumerate(zip(texts, verdicts, strict=True))
    ]
    assert main([str(run_with(tmp_path, rows)), "--reason=correct"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[6] == r"│ \boxed{}"
    assert said[-1] == "matching samples 10: correct 10"


@pytest.mark.parametrize("field", ["prompt", "answer", "completion", "reason", "set"])
def test_text_of_others_does_nothing(tmp_path: Path, field: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [sample(0, **{"completion": "fine", field: HOSTILE})]
    assert main([str(run_with(tmp_path, rows))]) == 0
    plain = capsys.readouterr().out
    coloured = io.StringIO()
    Console(file=coloured, force_terminal=True, color_system="truecolor", soft_wrap=True).print(sample_text(rows[0]))
    for said in (plain, coloured.getvalue()):
        assert "\x1b[2J" not in said and "\x1b]" not in said and not set("\x07\r\u202e") & set(said)
        assert r"\x1b[2J\x1b]0;title\x07 \u202egnorw [bold red]loud[/] :bomb:\rstep 9" in said
    assert "\x1b" not in plain


def test_no_line_of_a_text_passes_for_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forged = "\nstep 9 · train · reward 1\nmatching samples 9: correct 9"
    assert main([str(run_with(tmp_path, [sample(0, forged, prompt=forged, reason=f"a{forged}", set="b\n")]))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("step ") for line in lines) == 1
    assert sum("matching samples" in line and not line.startswith(("│", "step 0")) for line in lines) == 1


def test_tokens_have_the_colour_of_their_entropy_and_context_is_dimmed() -> None:
    text = "sure or 12 loud"
    row = sample(
        0, text, token_ids=(1, 2, 3, 4), token_ends=(4, 7, 10, 15), sampled=(True, True, False, True),
        logprob=(-0.1, -1.0, -2.0), token_entropy=(0.01, 0.6, 2.5),
    )  # fmt: skip
    shown = sample_text(row)
    styles = {shown.plain[span.start : span.end]: str(span.style) for span in shown.spans}
    assert (styles.get("sure"), styles[" or"], styles[" 12"], styles[" loud"]) == (
        None, "green", "dim italic", "bold red",
    )  # fmt: skip
    key = legend()
    ranges = {key.plain[span.start : span.end]: str(span.style) for span in key.spans}
    assert (ranges["0.5 to 1"], ranges["2 and more"]) == ("green", "bold red")


def test_tokens_that_end_outside_of_the_text_lose_none_of_it() -> None:
    row = sample(0, "whole text", token_ids=(1, 2, 3), token_ends=(3, 99, 2), token_entropy=(0.0, float("nan"), 9.0))
    assert "│ whole text\n" in sample_text(row).plain


def test_the_legend_is_for_terminals_alone(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run)]) == 0
    assert "token entropy in nats" not in capsys.readouterr().out
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert main([str(run)]) == 0
    assert capsys.readouterr().out.startswith("token entropy in nats: ")


def test_a_search_that_never_ends_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_with(tmp_path, [sample(3, "a" * 3000 + "b")])
    monkeypatch.setattr(selection, "SEARCH_LIMIT_S", 0.05)
    assert main([str(tmp_path), "--grep=(a|aa)+$"]) == 2
    assert "--grep=(a|aa)+$ takes more than 0.05 s on one completion of step 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--grep=(a",), "--grep=(a is no regular expression: missing )"),
        (("--step=x",), "--step=x must be a step, 12, or the first and the last of several, 10-20"),
        (("--step=3-",), "--step=3- must be a step"),
        (("--step=3-2",), "--step=3-2 must have its first step before its last one"),
        (("--limit=0",), "--limit=0 must be at least 1"),
    ],
)
def test_what_is_wrong_is_named(
    run: Path, options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run), *options]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_samples_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "holds no samples" in capsys.readouterr().err

"""Answers of 100 kB, integers without end: read once, judged, never an exception."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aer_megatron.rewards import extract
from aer_megatron.rewards.countdown import verify_countdown
from aer_megatron.rewards.extract import final_answer
from aer_megatron.rewards.math import decide_quickly, verify_math
from aer_megatron.types import Prompt

NINES = "9" * 5000


def prompt(answer: str) -> Prompt:
    return Prompt(1, "p", (1,), answer, "math")


@pytest.mark.parametrize(
    ("answer", "gold", "reason"),
    [
        (NINES, NINES, "correct"),
        (f"-{NINES}", "7", "wrong"),
        (f"{NINES}x", "x", "wrong"),
        (f"0.{NINES}", "0.5", "wrong"),
        (f"10^{{{NINES}}}", "5", "wrong"),
        (f"\\sqrt{{{NINES}}}", "5", "wrong"),
    ],
)
def test_integers_without_end_are_judged_and_raise_nothing(answer: str, gold: str, reason: str) -> None:
    verdict = verify_math(rf"\boxed{{{answer}}}", prompt(answer=gold))
    assert verdict.reward == float(reason == "correct")


def test_a_countdown_problem_has_a_target_of_bounded_length() -> None:
    with pytest.raises(ValueError, match="not of the form"):
        verify_countdown("1", Prompt(1, f"1={NINES}>", (1,), "1", "countdown"))


HOSTILE = ["<answer>", "</answer>", "\\boxed{", "{", "}", "answer", "answer:", "answer ", "</think>", "\\", "\n", " "]
HOSTILE += [",", "9", "0", ",000", "{,}", "$", "\\,"]


@pytest.mark.parametrize("part", HOSTILE)
@pytest.mark.parametrize("tail", ["", "<answer>1</answer>"])
def test_a_long_text_of_one_part_is_read_once(part: str, tail: str) -> None:
    text = part * (100_000 // len(part)) + tail
    begin = time.process_time()
    final_answer(text)
    decide_quickly(text, prompt(answer="1"))
    decide_quickly(f"\\boxed{{{text}x}}", prompt(answer=text))
    assert time.process_time() - begin < 1.5  # quadratic: 10 s for "<answer>"


@given(st.lists(st.sampled_from([*HOSTILE, "<answer", "x", ":"]), max_size=12).map("".join))
def test_the_last_tagged_answer_is_that_of_the_regular_expression(text: str) -> None:
    found = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    assert extract._last_tagged(text) == (found[-1] if found else None)

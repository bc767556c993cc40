from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from reasoning_gym import create_dataset

from aer_megatron.rewards import math
from aer_megatron.rewards.countdown import verify_countdown
from aer_megatron.rewards.extract import final_answer, last_boxed
from aer_megatron.rewards.reasoning_gym import ReasoningGymVerifier
from aer_megatron.rewards.registry import find_verifier, judge, to_verdict
from aer_megatron.types import Prompt, Verdict


def prompt(problem: str = "p", answer: str = "", verifier: str = "math") -> Prompt:
    return Prompt(1, problem, (1,), answer, verifier)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("no box", None),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}} done", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{3} or \boxed{4", "{4"),  # truncated: the earlier box is not the final answer
        (r"\boxed{}", ""),
        (r"\boxed{\boxed{7}}", "7"),
        ("\\boxed{1\\", "{1\\"),
    ],
)
def test_last_boxed(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" 42 ", "42"),
        ("", ""),
        ("Answer: 1\nwait\nAnswer: 2 \nbye", "2"),
        ("**Answer:** 7", "7"),
        ("the answer:\n 12", "12"),
        ("<answer>3</answer> <answer> 4 </answer>", "4"),
        (r"Answer: 5, \boxed{6}", "6"),
        (r"<think>\boxed{1}</think> 9", "9"),
    ],
)
def test_final_answer(text: str, answer: str) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("3+5*2-8", "correct"),  # 3 + 10 - 8 = 5
        ("2*5-8+3", "correct"),
        (" 3 + 5*2 - 8 ", "correct"),
        ("8-5+2*3", "wrong_value"),
        ("3+5+2-8", "wrong_value"),
        ("3+5", "wrong_numbers"),
        ("3+5*2-8+0", "wrong_numbers"),
        ("3+3*2-8", "wrong_numbers"),
        ("35*2-8", "wrong_numbers"),
        ("5", "wrong_numbers"),
        ("(3+5)*2-8", "malformed"),
        ("3+5*2-8=5", "malformed"),
        ("-8+3+5*2", "malformed"),
        ("3 5+2-8", "malformed"),
        ("03+5*2-8", "malformed"),
        ("٣+5*2-8", "malformed"),
        ("3**5+2-8", "malformed"),
        ("3+5*2-8<eos>", "malformed"),
        ("9" * 100_000, "malformed"),
        ("__import__('os')", "malformed"),
        ("", "no_answer"),
        ("  \n", "no_answer"),
    ],
)
def test_countdown(text: str, reason: str) -> None:
    assert verify_countdown(text, prompt("3,5,2,8=5>")) == Verdict(float(reason == "correct"), reason)


def test_countdown_needs_its_problem_form() -> None:
    with pytest.raises(ValueError, match="form"):
        verify_countdown("1", prompt("what is 1?"))
    assert judge(verify_countdown, "1", prompt("what?")) == Verdict(0.0, "verifier_error_value_error")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12),
        ("-3", -3),
        ("+3", 3),
        ("007", 7),
        ("1,234", 1234),
        ("1{,}234", 1234),
        (r"1\,234", 1234),
        ("1 234", None),  # a number for the grammar: "3 4" is none
        (r"\$5", None),
        (" 5 ", 5),
        ("1,23", None),
        ("5.0", None),
        (r"5\%", None),
        ("x", None),
        ("", None),
        ("²", None),
        ("9" * 5000, None),
    ],
)
def test_parse_integer(text: str, value: int | None) -> None:
    assert math.parse_integer(text) == value


@pytest.mark.parametrize(
    ("text", "gold", "reason"),
    [
        (r"\boxed{34}", "34", "correct"),
        (r"\boxed{1} \boxed{34}", "34", "correct"),
        (r"\boxed{34} \boxed{1}", "34", "wrong"),
        (r"\boxed{1,000}", "1000", "correct"),
        ("the answer is 34", "34", "no_answer"),
        (r"\boxed{ }", "34", "no_answer"),
        (r"\boxed{10000000000000001}", "10000000000000000", "wrong"),  # floats would call them equal
    ],
)
def test_math_integers_need_no_process(text: str, gold: str, reason: str) -> None:
    verdict = find_verifier("math").decide(text, prompt(answer=gold))
    assert verdict == Verdict(float(reason == "correct"), reason)


@pytest.mark.parametrize(
    ("text", "gold", "reason"),
    [
        (r"\boxed{\frac{2}{4}}", r"\frac{1}{2}", "correct"),
        (r"<think>\boxed{0.5}</think> \boxed{2}", r"\frac{1}{2}", "wrong"),
        (r"<think>\boxed{0.5}", r"\frac{1}{2}", "no_answer"),
        (r"\boxed 7", "7", "correct"),
        (r"\boxed{\frac{1}{", r"\frac{1}{2}", "no_answer"),
        (r"\boxed{3 4}", "34", "unparseable"),
        (r"\boxed{3+4}", "7", "wrong"),
        ("\\boxed{" + "1+" * 3000 + "1}", "7", "unparseable"),  # reading 150 kB took 6 s
    ],
)
def test_math_by_the_grammar(text: str, gold: str, reason: str) -> None:
    verdict = find_verifier("math").load(5.0)(text, prompt(answer=gold))
    assert verdict == Verdict(float(reason == "correct"), reason)


def test_math_verify_is_a_second_opinion() -> None:
    verify = find_verifier("math_verify").load(5.0)
    assert verify(r"\boxed{\frac{2}{4}}", prompt(answer=r"\frac{1}{2}")) == Verdict(1.0, "correct")
    assert verify(r"\boxed{\frac{2}{3}}", prompt(answer=r"\frac{1}{2}")) == Verdict(0.0, "wrong")


def test_math_leaves_algebra_open() -> None:
    assert find_verifier("math").decide(r"\boxed{\frac{4}{2}}", prompt(answer="2")) is None
    assert find_verifier("math").decide(r"\boxed{2}", prompt(answer="x")) is None


def test_reasoning_gym_counts_only_a_full_score() -> None:
    item = create_dataset("chain_sum", size=1, seed=1)[0]
    verify = find_verifier("reasoning_gym:chain_sum").load(5.0)
    asked = Prompt(1, item["question"], (1,), item["answer"], "reasoning_gym:chain_sum", {"item": item})
    gold = item["answer"]
    assert verify(rf"it is \boxed{{{gold}}}", asked) == Verdict(1.0, "correct")
    assert verify(gold, asked) == Verdict(1.0, "correct")
    assert verify(f"it is {gold}, or so", asked) == Verdict(0.0, "wrong")  # its scorer pays for the substring
    assert verify(f"Answer: {gold}9", asked) == Verdict(0.0, "wrong")
    assert verify(" ", asked) == Verdict(0.0, "no_answer")
    with pytest.raises(ValueError, match="item"):
        ReasoningGymVerifier("chain_sum")("1", prompt())


class Floating:
    def __float__(self) -> float:
        return 0.5


@pytest.mark.parametrize(
    ("result", "verdict"),
    [
        (True, Verdict(1.0, "correct")),
        (0, Verdict(0.0, "wrong")),
        (0.5, Verdict(0.5, "scored")),
        (Verdict(1, "fine"), Verdict(1.0, "fine")),
        (np.float32(0.25), Verdict(0.25, "scored")),
        (np.bool_(True), Verdict(1.0, "correct")),
        (np.int64(0), Verdict(0.0, "wrong")),
        (np.array(1.0), Verdict(1.0, "correct")),
        (Fraction(1, 2), Verdict(0.5, "scored")),
        (Floating(), Verdict(0.5, "scored")),
        (Verdict(np.float16(0.5), np.str_("half")), Verdict(0.5, "half")),
        (Verdict(0, "Wrong format"), Verdict(0.0, "wrong_format")),
        (Verdict(0, ""), Verdict(0.0, "other")),
        (Verdict(0, 404), Verdict(0.0, "reason_404")),  # type: ignore[arg-type]
    ],
)
def test_to_verdict(result: object, verdict: Verdict) -> None:
    found = to_verdict(result)
    assert found == verdict
    assert type(found.reward) is float and type(found.reason) is str


@pytest.mark.parametrize(
    "result",
    ["1", b"1", [1], {}, None, 1j, Verdict("1", "x"), Verdict(None, "x")],  # type: ignore[arg-type]
)
def test_to_verdict_refuses_what_is_no_number(result: object) -> None:
    with pytest.raises(TypeError, match="must return"):
        to_verdict(result)


@pytest.mark.parametrize("result", [float("nan"), float("-inf"), 1e7, 10**400, Verdict(-1e300, "x")])
def test_to_verdict_refuses_numbers_that_are_no_rewards(result: object) -> None:
    with pytest.raises((ValueError, OverflowError)):
        to_verdict(result)

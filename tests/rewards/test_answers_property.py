"""Whatever the policy writes, the judge of answers gives a verdict, and nested or huge answers end soon."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aer_megatron.rewards.answers.judge import matches
from aer_megatron.rewards.answers.words import word_set

PIECES = st.sampled_from(
    sorted(
        word_set(
            r"""\frac { } ( ) [ ] | ^ _ ! \sqrt \pm \cup \text{ \begin{pmatrix} \end{pmatrix} & \\ , ; : < \le = x y
            \infty % $ \ 12 0.5 9 \ln \binom
            10^ \overline \dot \lfloor \rfloor \{ \} or and cm \pi e i ² ½ − 1,234 1\,234"""
        )
    )
)


@given(st.lists(PIECES, max_size=25).map("".join), st.lists(PIECES, max_size=25).map("".join))
def test_any_text_gets_a_verdict(gold: str, answer: str) -> None:
    assert matches(gold, answer) in (True, False)


@given(st.text(max_size=60))
def test_any_characters_get_a_verdict(answer: str) -> None:
    assert matches(r"\frac{1}{2}", answer) in (True, False)


@given(st.fractions(max_denominator=10**6), st.fractions(max_denominator=10**6))
def test_fractions_are_compared_exactly(a: object, b: object) -> None:
    assert matches(str(a), f"\\frac{{{a.numerator}}}{{{a.denominator}}}")  # type: ignore[attr-defined]
    assert matches(str(a), str(b)) == (a == b)


@pytest.mark.parametrize(
    "answer",
    [
        "(" * 5000,
        "{" * 3000 + "1" + "}" * 3000,
        "9^{9^{9^{9^{9}}}}",
        "9" * 4000 + "!",
        "((5000!)!)!",
        "10^{10^{10}}-10^{10^{10}}",
        r"\sqrt{" * 300 + "2" + "}" * 300,
        ",".join(["x"] * 1500),
        r"\pm" * 900 + "1",
        r"\frac1" * 600,
        "1" + r"\cdot 2" * 500,
        "|" * 3000,
    ],
)
def test_hostile_answers_end_soon(answer: str) -> None:
    begin = time.process_time()
    assert not matches("7", answer)
    assert time.process_time() - begin < 5  # a bound of the machine's, far above what is measured (0.1 s)

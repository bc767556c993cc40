"""Samples of a problem by the answer that they give."""

from __future__ import annotations

import pytest

from aer_megatron.rewards.answer_classes import AnswerClasses, classify_answers
from aer_megatron.rewards.pool import VerifierPool
from aer_megatron.types import Completion, Prompt, RolloutGroup, ScoredGroup, Verdict, VersionSpan


def scored(verifier: str, *texts: str, right: str = "?") -> ScoredGroup:
    """Returns a group whose token ids are the characters of its texts."""
    prompt = Prompt(1, "?", (1,), "7", verifier)
    completions = tuple(
        Completion(tuple(map(ord, text)), (0.0,) * len(text), "stop", (VersionSpan(0, 0, len(text)),)) for text in texts
    )
    return ScoredGroup(
        RolloutGroup(prompt, completions), tuple(Verdict(float(text == right), "correct") for text in texts)
    )


def decode(ids):
    return "".join(map(chr, ids))


def classes(*groups: ScoredGroup) -> list[AnswerClasses | None]:
    with VerifierPool(1, 10.0) as pool:
        return classify_answers(groups, decode, pool)


def box(text: str) -> str:
    return f"so \\boxed{{{text}}}"


def test_integers_and_texts_need_no_process():
    group = scored("math", box("7"), box("12"), box("12 "), box("1{,}000"), box("1000"), "none", right=box("7"))
    assert classes(group) == [AnswerClasses((1, 2, 2), 0)]
    words = scored("reasoning_gym:chain_sum", "Answer: 5", "<answer>5</answer>", "Answer: 6", "")
    assert classes(words) == [AnswerClasses((2, 1), None)]


def test_a_verifier_without_answers_has_no_classes():
    assert classes(scored("countdown", "1+2"), scored("math", "no box")) == [None, AnswerClasses((), None)]


@pytest.mark.processes
def test_wrong_answers_are_the_same_where_the_verifier_says_so():
    half = scored("math", box(r"\frac{1}{2}"), box("0.5"), box("1/2"), box(r"\frac13"), box("7"), right=box("7"))
    other = scored("math", box("x+1"), box("1+x"), box("0.5"))
    assert classes(half, other) == [AnswerClasses((3, 1, 1), 2), AnswerClasses((2, 1), None)]

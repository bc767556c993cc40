"""Rows of the usual sets, with the columns that the hub has, as rows of this project."""

from __future__ import annotations

from typing import Any

import pytest

from aer_megatron.data.records import Rules, parse_record
from aer_megatron.prepare_data.known_sets import KNOWN_SETS

RULES = Rules("answer", "math", lambda name: False)
DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\nWhat is $1+1$?\n\nRemember to put your "
    'answer on its own line after "Answer:".'
)


@pytest.mark.parametrize(
    ("name", "row", "problem", "answer"),
    [
        (
            "dapo_math_17k",
            {"prompt": [{"role": "user", "content": DAPO}], "reward_model": {"ground_truth": "2", "style": "rule"}},
            "What is $1+1$?",
            "2",
        ),
        (
            "gsm8k_train",
            {"question": "How many? ", "answer": "1,000+5=<<1000+5=1005>>\n#### 1,005"},
            "How many?",
            "1005",
        ),
        (
            "math_train",
            {
                "problem": "Find x.",
                "level": "Level 5",
                "type": "Algebra",
                "solution": r"So \boxed{0}, no, $\boxed{\frac{1}{2}}$.",
            },
            "Find x.",
            r"\frac{1}{2}",
        ),
        (
            "math500",
            {"problem": "p", "solution": r"\boxed{8}", "answer": "7", "level": 3, "unique_id": "a/b"},
            "p",
            "7",
        ),
        ("aime24", {"id": 60, "problem": "p", "solution": "s", "answer": "204", "year": "2024"}, "p", "204"),
        ("aime25", {"problem": "p", "answer": "070", "id": "0"}, "p", "070"),
        ("amc23", {"id": 0, "question": "q", "answer": 27.0, "url": "u"}, "q", "27"),
        ("amc23", {"question": "q", "answer": "27.0"}, "q", "27"),
        ("amc23", {"question": "q", "answer": 0.5}, "q", "0.5"),
        ("gsm8k_test", {"problem": "as this project has it", "answer": "7"}, "as this project has it", "7"),
    ],
)
def test_a_row_of_the_hub(name: str, row: dict[str, Any], problem: str, answer: str) -> None:
    converted = KNOWN_SETS[name].convert(row)
    record = parse_record(converted, RULES)
    assert (record.problem, record.answer) == (problem, answer)
    assert set(converted) <= {"problem", "answer", "level", "type", "subject"}


@pytest.mark.parametrize("name", KNOWN_SETS)
@pytest.mark.parametrize(
    "row",
    [
        None,
        [],
        "x",
        {},
        {"question": 3, "answer": 3},
        {"prompt": [1], "reward_model": "x"},
        {"problem": "p", "solution": 1},
        {"problem": "p", "solution": "no box"},
        {"question": "q", "answer": None},
        {"prompt": [{"content": None}]},
    ],
)
def test_a_row_that_is_none_of_a_set_is_a_bad_record(name: str, row: Any) -> None:
    with pytest.raises(ValueError, match=r"record|must be|missing"):
        parse_record(KNOWN_SETS[name].convert(row), RULES)

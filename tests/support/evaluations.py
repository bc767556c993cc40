"""Results of evaluations that were never made, for tests of what reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aer_megatron.evaluate.result import Answers, EvaluatedSet, Problem, Result, write_result


def problem(number: int, correct: int, *, samples: int = 8, **changes: Any) -> Problem:
    """Returns a problem with ``correct`` right samples; the others gave one wrong answer."""
    sizes = [size for size in (correct, samples - correct) if size]
    fields = {
        "id": f"{number:016x}",
        "problem": f"problem {number}",
        "samples": samples,
        "correct": correct,
        "truncated": 0,
        "reward": float(correct),
        "tokens": 10 * samples,
        "classes": sizes,
        "right": 0 if correct else None,
        "digest": f"{correct:016x}",
    }
    return Problem(**fields | changes)


def result(correct: Sequence[int], *, name: str = "gsm8k", grader: str = "math", first: int = 0) -> Result:
    """Returns the result of one set at temperature 0.6, k = 1 and 4."""
    problems = [problem(first + number, count) for number, count in enumerate(correct)]
    answers = Answers(temperature=0.6, num_samples=8, k=[1, 4], problems=problems)
    return Result(
        format=1,
        time="2026-01-01T00:00:00+00:00",
        policy={"kind": "folder", "path": "model", "weights": "0123456789abcdef"},
        engine={"engine": "embedded"},
        versions={"torch": "2.13"},
        sets={name: EvaluatedSet(grader={grader: "1"}, settings={}, answers=[answers])},
    )


def written(path: Path, of: Result) -> Path:
    write_result(path, of)
    return path

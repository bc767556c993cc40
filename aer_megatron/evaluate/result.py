"""The result of an evaluation as one JSON file: written, read back and summed up. docs/evaluate.md describes it.

A file that is read is another's word: its size is bounded, and what does not fit the form is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from aer_megatron.algo.passk import majority_at_k, mean_interval, pass_at_k
from aer_megatron.files.json_input import read_json_object
from aer_megatron.files.whole_files import replace_file
from aer_megatron.types import Float64Array, Int64Array

_Count = Annotated[int, Field(ge=0, lt=2**31)]
_Label = Annotated[str, Field(max_length=4096)]
_Hex = Annotated[str, Field(pattern="^[0-9a-f]{16}$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Problem(_Part):
    """What the samples of one problem gave at one temperature."""

    id: _Hex  # of the prompt
    problem: _Label  # its beginning
    samples: Annotated[int, Field(ge=1, lt=2**31)]
    correct: _Count
    truncated: _Count  # samples cut at max_new_tokens
    reward: float  # sum
    tokens: _Count  # of all samples
    classes: list[Annotated[int, Field(ge=1, lt=2**31)]] | None  # sizes of the classes of equivalent answers
    right: _Count | None  # which class is right
    digest: _Hex  # of the token ids of all samples

    @model_validator(mode="after")
    def _counts(self) -> Problem:
        if max(self.correct, self.truncated) > self.samples:
            raise ValueError("a count exceeds samples")
        check_classes(self.samples, self.classes, self.right)
        return self


def check_classes(samples: int, classes: Sequence[int] | None, right: int | None) -> None:
    """Raises ValueError unless the classes of answers fit the number of samples, and ``right`` is one of them."""
    if sum(classes or ()) > samples:
        raise ValueError("classes hold more answers than there are samples")
    if right is not None and right not in range(len(classes or ())):
        raise ValueError("right is none of classes")


class Answers(_Part):
    """All problems of a set at one temperature."""

    temperature: Annotated[float, Field(ge=0)]
    num_samples: Annotated[int, Field(ge=1)]
    k: list[Annotated[int, Field(ge=1)]]
    problems: Annotated[list[Problem], Field(min_length=1)]
    measures: dict[_Label, list[float | None]] = Field(default_factory=dict)  # of ``sum_up``: for readers without it

    @model_validator(mode="after")
    def _enough(self) -> Answers:
        if any(problem.samples < max(self.k, default=1) for problem in self.problems):
            raise ValueError("k exceeds samples")
        return self


class EvaluatedSet(_Part):
    grader: dict[str, _Label | None]  # verifier -> the version of what judges
    settings: dict[str, Any]
    answers: Annotated[list[Answers], Field(min_length=1)]


class Result(_Part):
    """An evaluation: which policy, by what, and what came of it. ``sets`` maps names to results."""

    format: Literal[1]
    time: _Label
    policy: dict[str, _Label | int | None]
    engine: dict[str, Any]
    versions: dict[str, _Label | None]
    sets: Annotated[dict[str, EvaluatedSet], Field(min_length=1)]


class Measure(NamedTuple):
    """A mean over problems with its 95 % interval, both None where it has none."""

    value: float
    low: float | None = None
    high: float | None = None


def read_result(path: Path) -> Result:
    """Returns the result that ``path`` holds.

    Raises:
        ValueError: it is missing, too large, or no result of an evaluation; the file and what is wrong are named.
    """
    table = read_json_object(path)
    try:
        return Result.model_validate(table)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))[:200]
        raise ValueError(f"{path} is no result of aer evaluate: {where}: {first['msg']}; evaluate again") from None


def write_result(path: Path, result: Result) -> None:
    """Writes the result in one atomic rename."""
    replace_file(path, result.model_dump_json(indent=1) + "\n")


def counts(problems: Sequence[Problem]) -> tuple[Int64Array, Int64Array]:
    """Returns samples and right ones per problem, int64 [P]."""
    return (
        np.array([problem.samples for problem in problems], dtype=np.int64),
        np.array([problem.correct for problem in problems], dtype=np.int64),
    )


def majority(problems: Sequence[Problem], k: int) -> Float64Array | None:
    """Returns maj@k per problem, float64 [P]; None where a verifier does not tell answers apart."""
    classes = [problem.classes for problem in problems]
    if any(sizes is None for sizes in classes):
        return None
    right_P = [problem.right for problem in problems]
    return majority_at_k(counts(problems)[0], [sizes or [] for sizes in classes], right_P, k=k)


def sum_up(answers: Answers) -> dict[str, Measure]:
    """Returns pass@k and maj@k with intervals, the mean reward, the mean length and the share that was cut."""
    problems = answers.problems
    samples_P, correct_P = counts(problems)
    total = int(samples_P.sum())
    found: dict[str, Measure] = {}
    for k in answers.k:
        pass_P = pass_at_k(samples_P, correct_P, k=k)
        found[f"pass@{k}"] = Measure(float(pass_P.mean()), *mean_interval(pass_P, samples_P))
    for k in answers.k:
        voted_P = majority(problems, k)
        if voted_P is not None and k > 1:
            found[f"maj@{k}"] = Measure(float(voted_P.mean()), *mean_interval(voted_P, samples_P))
    found[f"avg@{answers.num_samples}"] = Measure(sum(problem.reward for problem in problems) / total)
    found["response_length_mean"] = Measure(sum(problem.tokens for problem in problems) / total)
    found["truncated"] = Measure(sum(problem.truncated for problem in problems) / total)
    return found

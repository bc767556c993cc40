"""Two evaluations of the same problems: paired differences, how sure they are, and which problems changed sides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aer_megatron.algo.passk import paired_interval, pass_at_k
from aer_megatron.evaluate.result import Answers, Problem, Result, counts, majority
from aer_megatron.types import Float64Array

_EXACT = 16  # differences other than 0 of which every choice of signs is tried: 65,536
_DRAWS = 100_000  # choices of signs beyond
_BLOCK = 1000
_SOLVED = 0.5  # a problem is on the side of those that are solved where half of its samples are right


@dataclass(frozen=True, slots=True)
class Difference:
    """One measure of one set at one temperature: ``second - first``, with a 95 % interval, mean over the problems."""

    name: str
    temperature: float
    measure: str
    first: float
    second: float
    low: float
    high: float
    p_value: float

    @property
    def value(self) -> float:
        return self.second - self.first


@dataclass(frozen=True, slots=True)
class Change:
    """A problem that one policy solves with at least half of its samples, and the other does not."""

    name: str
    temperature: float
    first: Problem
    second: Problem

    @property
    def gained(self) -> bool:
        return _solved(self.second)


def compare(first: Result, second: Result, files: tuple[Path, Path]) -> tuple[list[Difference], list[Change]]:
    """Returns the differences of every measure that both have, and the problems that changed sides.

    Raises:
        ValueError: the two are not of the same sets, temperatures, problems or graders.
    """
    _check_same("sets", sorted(first.sets), sorted(second.sets), files)
    differences: list[Difference] = []
    changes: list[Change] = []
    for name in first.sets:
        pair = first.sets[name], second.sets[name]
        _check_same(f"graders of {name}", pair[0].grader, pair[1].grader, files)
        temperatures = [sorted(answers.temperature for answers in each.answers) for each in pair]
        _check_same(f"temperatures of {name}", temperatures[0], temperatures[1], files)
        second_answers = {answers.temperature: answers for answers in pair[1].answers}
        for before in pair[0].answers:
            after = second_answers[before.temperature]
            _check_problems(name, before, after, files)
            differences += _differences(name, before, after)
            changes += [
                Change(name, before.temperature, a, b)
                for a, b in zip(before.problems, after.problems, strict=True)
                if _solved(a) != _solved(b)
            ]
    return differences, changes


def sign_flip_p_value(difference_P: Float64Array) -> float:
    """Returns the two-sided p-value of the mean of paired differences, float64 [P], under a random sign of each.

    Exact, over all choices of signs, where at most 16 of them are not 0. Else it is (1 + those of 100,000 seeded
    choices that are as far from 0) / (1 + 100,000).
    """
    moved_P = difference_P[difference_P != 0]
    if not len(moved_P):
        return 1.0
    found = abs(moved_P.sum()) * (1 - 1e-12)
    if len(moved_P) <= _EXACT:
        signs = 1 - 2 * (np.arange(1 << len(moved_P))[:, None] >> np.arange(len(moved_P)) & 1)
        return float((np.abs(signs @ moved_P) >= found).mean())
    random = np.random.default_rng(0)
    as_far = 0
    for _ in range(_DRAWS // _BLOCK):
        signs = 1 - 2 * random.integers(0, 2, (_BLOCK, len(moved_P)), dtype=np.int8)
        as_far += int((np.abs(signs @ moved_P) >= found).sum())
    return (1 + as_far) / (1 + _DRAWS)


def _differences(name: str, before: Answers, after: Answers) -> list[Difference]:
    values: dict[str, list[Float64Array | None]] = {}
    shared = [k for k in before.k if k in after.k]
    for k in shared:
        values[f"pass@{k}"] = [pass_at_k(*counts(each.problems), k=k) for each in (before, after)]
    for k in shared:
        if k > 1:
            values[f"maj@{k}"] = [majority(each.problems, k) for each in (before, after)]
    found = []
    for measure, (first_P, second_P) in values.items():
        if first_P is None or second_P is None:
            continue
        difference_P = second_P - first_P
        found.append(
            Difference(
                name,
                before.temperature,
                measure,
                float(first_P.mean()),
                float(second_P.mean()),
                *paired_interval(difference_P),
                sign_flip_p_value(difference_P),
            )
        )
    return found


def _solved(problem: Problem) -> bool:
    return problem.correct >= _SOLVED * problem.samples


def _check_same(what: str, first: object, second: object, files: tuple[Path, Path]) -> None:
    if first != second:
        raise ValueError(
            f"{files[0]} and {files[1]} differ in the {what}: {first} and {second}; compare evaluations of the same"
        )


def _check_problems(name: str, before: Answers, after: Answers, files: tuple[Path, Path]) -> None:
    ids: list[Sequence[str]] = [[problem.id for problem in each.problems] for each in (before, after)]
    if ids[0] != ids[1]:
        only = len(set(ids[0]) - set(ids[1])), len(set(ids[1]) - set(ids[0]))
        raise ValueError(
            f"{files[0]} and {files[1]} hold different problems of {name}: {len(ids[0])} and {len(ids[1])}, of which "
            f"{only[0]} and {only[1]} are not in the other (or they stand in another order); evaluate both on the same "
            "data and num_prompts"
        )

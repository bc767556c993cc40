"""Which samples of a problem gave the same answer: what a majority vote counts.

    verifier              the answer                      the same answer
    math, math_verify     the last box                    the verifier takes one for the other
    reasoning_gym:NAME    what the text ends with         the same text
    any other             none: its samples have no vote, and the problem no majority

This file does NOT count votes (algo/passk.py).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from aer_megatron.rewards.extract import boxed_answer, final_answer
from aer_megatron.rewards.math import parse_integer
from aer_megatron.rewards.pool import Job, VerifierPool
from aer_megatron.rewards.registry import find_verifier, judge
from aer_megatron.types import Prompt, ScoredGroup

_ALGEBRA = ("math", "math_verify")  # they judge any answer against any other
_MAX_COMPARED = 16  # of a problem's most frequent wrong answers; every pair of them is one question to the verifier


@dataclass(frozen=True, slots=True)
class AnswerClasses:
    """The classes of equivalent answers of one problem's samples; what their sizes lack gave no answer.

    Example: of 8 samples 3 are right, 4 say "12" and one has no box: ``AnswerClasses((3, 4), right=0)``.
    """

    sizes: tuple[int, ...]
    right: int | None  # which class the verifier takes for right


def tells_answers_apart(verifier: str) -> bool:
    """Returns whether the samples of a problem with this verifier have a vote."""
    return verifier in _ALGEBRA or verifier.startswith("reasoning_gym:")


def classify_answers(
    scored: Sequence[ScoredGroup], decode: Callable[[Sequence[int]], str], pool: VerifierPool
) -> list[AnswerClasses | None]:
    """Returns the classes of every group's answers, None where the verifier does not tell them apart.

    All samples with reward >= 1 are one class. Two wrong answers of a mathematical verifier are one class where it
    takes the less frequent one for the other; beyond the 16 most frequent of a problem they are compared as texts.

    Raises:
        RuntimeError: the pool cannot work (see ``VerifierPool.verify``).
    """
    votes = [_votes(group, decode) if tells_answers_apart(group.group.prompt.verifier) else None for group in scored]
    pairs = [
        (index, first, second)
        for index, counts in enumerate(votes)
        if counts and scored[index].group.prompt.verifier in _ALGEBRA
        for first, second in itertools.combinations(_compared(counts), 2)
    ]
    same = _same([(scored[index].group.prompt, first, second) for index, first, second in pairs], pool)
    joined: dict[int, dict[str, str]] = {}
    for (index, first, second), is_same in zip(pairs, same, strict=True):
        if is_same:
            names = joined.setdefault(index, {})
            names.setdefault(second, names.get(first, first))
    return [None if counts is None else _classes(counts, joined.get(index, {})) for index, counts in enumerate(votes)]


def _votes(group: ScoredGroup, decode: Callable[[Sequence[int]], str]) -> Counter[str | None]:
    """Returns how many samples gave each answer; that of the right ones is None."""
    counts: Counter[str | None] = Counter()
    algebra = group.group.prompt.verifier in _ALGEBRA
    for completion, verdict in zip(group.group.completions, group.verdicts, strict=True):
        if verdict.reward >= 1:
            counts[None] += 1
            continue
        text = decode(completion.token_ids)
        answer = " ".join(((boxed_answer(text) if algebra else final_answer(text)) or "").split())
        integer = parse_integer(answer) if algebra else None
        if answer:
            counts[answer if integer is None else str(integer)] += 1
    return counts


def _compared(counts: Counter[str | None]) -> list[str]:
    """Returns the most frequent wrong answers."""
    wrong = [answer for answer, _ in counts.most_common() if answer is not None]
    return wrong[:_MAX_COMPARED]


def _same(questions: Sequence[tuple[Prompt, str, str]], pool: VerifierPool) -> list[bool]:
    """Returns of every (problem, first answer, second answer) whether its verifier takes the second for the first."""
    jobs = [
        Job(prompt.verifier, f"\\boxed{{{second}}}", replace(prompt, answer=first))
        for prompt, first, second in questions
    ]
    quick = [judge(find_verifier(job.verifier).decide, job.text, job.prompt) for job in jobs]
    waiting = [job for job, verdict in zip(jobs, quick, strict=True) if verdict is None]
    judged = iter(pool.verify(waiting) if waiting else ())
    return [(verdict or next(judged)).reward >= 1 for verdict in quick]


def _classes(counts: Counter[str | None], joined: Mapping[str, str]) -> AnswerClasses:
    sizes: Counter[str | None] = Counter()
    for answer, count in counts.items():
        sizes[None if answer is None else joined.get(answer, answer)] += count
    names = list(sizes)
    return AnswerClasses(tuple(sizes[name] for name in names), names.index(None) if None in names else None)

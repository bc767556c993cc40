"""What is wrong with a problem file: problems that come twice, with several answers, or with one no verifier can judge.

A gold answer is judged against itself by the verifier of its record, in the worker processes that training has.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from aer_megatron.prepare_data.normal_form import essence
from aer_megatron.prepare_data.problems import BadRow, Problem, ProblemFile
from aer_megatron.rewards.pool import Job, VerifierPool
from aer_megatron.rewards.registry import find_verifier, judge
from aer_megatron.types import Prompt, Verdict


class Unjudged(NamedTuple):
    problem: Problem
    reason: str  # of the verdict, e.g. "bad_gold" or "timeout"


class Findings(NamedTuple):
    """What ``check`` found in one file."""

    num_records: int
    bad: list[BadRow]
    duplicates: list[list[Problem]]  # groups of one problem with one answer
    conflicts: list[list[Problem]]  # groups of one problem with different answers
    unjudged: list[Unjudged]
    kept: list[Problem]  # one of each problem with one answer that its verifier judges


def check(file: ProblemFile, pool: VerifierPool) -> Findings:
    """Returns what is wrong with a file, and the records without fault.

    Raises:
        ValueError: a record names an unknown verifier.
        RuntimeError: the pool cannot work.
    """
    verdicts = _judge_golds(file.problems, pool)
    unjudged = [
        Unjudged(problem, verdict.reason)
        for problem, verdict in zip(file.problems, verdicts, strict=True)
        if verdict.reward != 1.0
    ]
    groups: dict[str, list[Problem]] = defaultdict(list)
    for problem in file.problems:
        groups[essence(problem.text)].append(problem)
    repeated = [group for group in groups.values() if len(group) > 1]
    has_conflict = _have_conflicts(repeated, pool)
    conflicts = [group for group, conflict in zip(repeated, has_conflict, strict=True) if conflict]
    out = {id(problem) for group in conflicts for problem in group} | {id(item.problem) for item in unjudged}
    firsts = (next((problem for problem in group if id(problem) not in out), None) for group in groups.values())
    return Findings(
        num_records=len(file.problems),
        bad=file.bad,
        duplicates=[group for group, conflict in zip(repeated, has_conflict, strict=True) if not conflict],
        conflicts=conflicts,
        unjudged=unjudged,
        kept=[problem for problem in firsts if problem is not None],
    )


def _judge_golds(problems: Sequence[Problem], pool: VerifierPool) -> list[Verdict]:
    """Returns the verdict on every gold answer, given in a box and, where that is not correct, alone."""
    verdicts = _judge([(problem, rf"\boxed{{{problem.record.answer}}}") for problem in problems], pool)
    missed = [index for index, verdict in enumerate(verdicts) if verdict.reward != 1.0]
    again = _judge([(problems[index], problems[index].record.answer) for index in missed], pool)
    for index, verdict in zip(missed, again, strict=True):
        if verdict.reward == 1.0:
            verdicts[index] = verdict
    return verdicts


def _have_conflicts(groups: Sequence[Sequence[Problem]], pool: VerifierPool) -> list[bool]:
    """Returns of each group whether an answer is another one than its first, for the first one's verifier.

    Two spellings of one answer (1/2 and 0.5) are no conflict.
    """
    pairs = [
        (number, (group[0], rf"\boxed{{{other.record.answer}}}"))
        for number, group in enumerate(groups)
        for other in group[1:]
        if other.record.answer.strip() != group[0].record.answer.strip()
    ]
    verdicts = _judge([pair for _, pair in pairs], pool)
    wrong = {number for (number, _), verdict in zip(pairs, verdicts, strict=True) if verdict.reward != 1.0}
    return [number in wrong for number in range(len(groups))]


def _judge(answers: Sequence[tuple[Problem, str]], pool: VerifierPool) -> list[Verdict]:
    """Returns the verdict on each (problem, completion), as training would reach it."""
    verdicts: list[Verdict | None] = []
    jobs: list[Job] = []
    for problem, text in answers:
        record = problem.record
        prompt = Prompt(record.id, record.problem, (), record.answer, record.verifier, record.metadata)
        verdict = judge(find_verifier(record.verifier).decide, text, prompt)
        if verdict is None:
            jobs.append(Job(record.verifier, text, prompt))
        verdicts.append(verdict)
    from_pool = iter(pool.verify(jobs) if jobs else ())
    return [next(from_pool) if verdict is None else verdict for verdict in verdicts]

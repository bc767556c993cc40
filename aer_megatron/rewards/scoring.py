"""Rollout groups in, scored groups out: decodes, decides cheap cases here, sends the open ones to the pool.

This file does NOT know how a verdict is reached (rewards/registry.py) or how processes are kept
(rewards/pool.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from aer_megatron.rewards.labels import bound_counts
from aer_megatron.rewards.pool import Job, VerifierPool
from aer_megatron.rewards.registry import find_verifier, judge
from aer_megatron.types import RolloutGroup, ScoredGroup, Verdict


def score_groups(
    groups: Sequence[RolloutGroup], decode: Callable[[Sequence[int]], str], pool: VerifierPool
) -> list[ScoredGroup]:
    """Returns every group with one verdict per completion, both in the order given.

    The pool starts a process only if some verdict needs one.

    Raises:
        ValueError: a prompt names an unknown verifier.
        RuntimeError: the pool cannot work (see ``VerifierPool.verify``).
    """
    verifiers = {name: find_verifier(name) for name in {group.prompt.verifier for group in groups}}
    verdicts: list[Verdict | None] = []
    jobs: list[Job] = []
    for group in groups:
        verifier = verifiers[group.prompt.verifier]
        for completion in group.completions:
            text = decode(completion.token_ids)
            verdict = judge(verifier.decide, text, group.prompt)
            if verdict is None:
                jobs.append(Job(verifier.name, text, group.prompt))
            verdicts.append(verdict)
    from_pool = iter(pool.verify(jobs) if jobs else ())
    complete = iter([next(from_pool) if verdict is None else verdict for verdict in verdicts])
    return [ScoredGroup(group, tuple(next(complete) for _ in group.completions)) for group in groups]


def reason_counts(scored: Iterable[ScoredGroup]) -> dict[str, int]:
    """Returns how many verdicts have each reason, most frequent first; beyond 32 reasons the rest is "other".

    Example: ``{"wrong": 301, "correct": 180, "no_answer": 29, "timeout": 2}``
    """
    counts = Counter(verdict.reason for group in scored for verdict in group.verdicts)
    return bound_counts(counts)

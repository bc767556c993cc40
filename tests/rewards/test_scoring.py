from __future__ import annotations

from collections.abc import Sequence

import pytest

from aer_megatron.rewards.pool import VerifierPool
from aer_megatron.rewards.scoring import reason_counts, score_groups
from aer_megatron.types import Completion, Prompt, RolloutGroup, Verdict, VersionSpan


def group(problem: str, answer: str, verifier: str, texts: Sequence[str]) -> RolloutGroup:
    completions = tuple(
        Completion(tuple(map(ord, text)), (0.0,) * len(text), "stop", (VersionSpan(0, 0, len(text)),)) for text in texts
    )
    return RolloutGroup(Prompt(1, problem, (1,), answer, verifier), completions)


def decode(ids: Sequence[int]) -> str:
    return "".join(map(chr, ids))


def test_cheap_verdicts_start_no_process() -> None:
    groups = [
        group("3,5,2,8=5>", "5", "countdown", ["3+5*2-8", "3", ""]),
        group("p", "7", "math", [r"\boxed{7}", "7"]),
    ]
    with VerifierPool(num_workers=1, timeout_s=1.0) as pool:
        scored = score_groups(groups, decode, pool)
        assert pool._workers == []
    assert [s.group for s in scored] == groups
    assert scored[0].verdicts == (
        Verdict(1.0, "correct"),
        Verdict(0.0, "wrong_numbers"),
        Verdict(0.0, "no_answer"),
    )
    assert scored[1].verdicts == (Verdict(1.0, "correct"), Verdict(0.0, "no_answer"))
    assert reason_counts(scored) == {"correct": 2, "no_answer": 2, "wrong_numbers": 1}


@pytest.mark.processes
def test_pool_verdicts_come_back_to_their_completions() -> None:
    exact = "tests.support.bad_verifiers:exact"
    groups = [
        group("p", "b", exact, ["a", "b", "c"]),
        group("1,1,1,1=4>", "4", "countdown", ["1+1+1+1"]),
        group("q", "d", exact, ["d", "e"]),
    ]
    with VerifierPool(num_workers=2, timeout_s=5.0) as pool:
        scored = score_groups(groups, decode, pool)
    assert [[v.reward for v in s.verdicts] for s in scored] == [[0, 1, 0], [1], [1, 0]]


def test_an_error_in_the_trainers_process_is_a_verdict_too() -> None:
    with VerifierPool(num_workers=1, timeout_s=1.0) as pool:
        scored = score_groups([group("no countdown problem", "", "countdown", ["1"])], decode, pool)
    assert scored[0].verdicts == (Verdict(0.0, "verifier_error_value_error"),)


def test_unknown_verifier_is_an_error_not_a_zero() -> None:
    with (
        VerifierPool(num_workers=1, timeout_s=1.0) as pool,
        pytest.raises(ValueError, match=r"verifier 'maths' is unknown.*countdown"),
    ):
        score_groups([group("p", "1", "maths", ["1"])], decode, pool)

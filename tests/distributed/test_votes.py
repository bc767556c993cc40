"""maj@k of an evaluation set: problems of all ranks in their order, each voted on where its samples are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from aer_megatron.compose.evaluation import vote
from aer_megatron.rewards.pool import VerifierPool
from aer_megatron.types import Completion, Prompt, RolloutGroup, ScoredGroup, Verdict, VersionSpan
from tests.support.spawn import run_distributed

RIGHT, WRONG, NONE = r"\boxed{7}", r"\boxed{12}", "no box"
GROUPS = [
    [(RIGHT, RIGHT, WRONG, WRONG), (RIGHT, RIGHT, RIGHT, WRONG)],  # of rank 0
    [(NONE, NONE, NONE, RIGHT)],
    [],
]


def _scored(texts: tuple[str, ...]) -> ScoredGroup:
    completions = tuple(
        Completion(tuple(map(ord, text)), (0.0,) * len(text), "stop", (VersionSpan(0, 0, len(text)),)) for text in texts
    )
    group = RolloutGroup(Prompt(1, "?", (1,), "7", "math"), completions)
    return ScoredGroup(group, tuple(Verdict(float(text == RIGHT), "any") for text in texts))


def _vote(rank: int, world_size: int) -> dict[int, list[float]]:
    with VerifierPool(1, 10.0) as pool:  # integers need none of its processes
        found = vote(
            [_scored(texts) for texts in GROUPS[rank]],
            [2, 4],
            decode=lambda ids: "".join(map(chr, ids)),
            pool=pool,
            device=torch.device("cpu"),
        )
    return {k: values_P.tolist() for k, values_P in found.items()}


@pytest.mark.processes
def test_three_uneven_ranks_count_the_votes_of_all_problems() -> None:
    # of the six pairs of the first problem one is right twice, four are a tie, and so on
    expected = {2: [1 / 6 + 4 / 6 / 2, 3 / 6 + 3 / 6 / 2, 3 / 6], 4: [0.5, 1.0, 1.0]}
    for found in run_distributed(_vote, 3, timeout_s=300):
        assert found.keys() == expected.keys()
        for k, values in expected.items():
            np.testing.assert_allclose(found[k], values, rtol=1e-12)

"""RLOO, max@k and pass@k training against numbers derived by hand and against every subset."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aer_megatron.algo.advantages.grpo import Grpo
from aer_megatron.algo.advantages.max_at_k import MaxAtK, PassAtK
from aer_megatron.algo.advantages.rloo import Rloo

GROUP = st.lists(st.sampled_from([0.0, 1.0, 0.25, -0.5]), min_size=2, max_size=7)


def of_one_group(rule: Any, rewards: list[float]) -> list[float]:
    advantage_B, reported = rule.advantages(np.array(rewards), np.zeros(len(rewards), dtype=np.int64))
    assert not reported
    return advantage_B.tolist()


def test_rloo_leaves_a_rollout_out_of_its_baseline() -> None:
    # others of the first: mean 1/3; others of a zero: mean 1/3 of {1, 0, ...}
    assert of_one_group(Rloo(), [1.0, 0.0, 1.0, 0.0]) == pytest.approx([2 / 3, -2 / 3, 2 / 3, -2 / 3])
    advantage_B, _ = Rloo().advantages(np.array([1.0, 0.5, 3.0]), np.array([0, 1, 0]))
    assert advantage_B.tolist() == [-2.0, 0.0, 2.0]  # a rollout alone has no baseline


def test_one_right_of_four_at_two() -> None:
    # subsets of two with the right one: all three have maximum 1; with a wrong one: one of three
    # loo_minus_one: k (mean max with i - mean max of the other of the subset) = 2 (1 - 0), 2 (1/3 - 1/3)
    assert of_one_group(MaxAtK(k=2), [1.0, 0.0, 0.0, 0.0]) == pytest.approx([2.0, 0.0, 0.0, 0.0])
    # loo: 2 (1 - 0); a wrong one: 2 (1/3 - 2/3), of three others one right: 2 of 3 pairs have it
    assert of_one_group(MaxAtK(k=2, baseline="loo"), [1.0, 0.0, 0.0, 0.0]) == pytest.approx([2.0] + [-2 / 3] * 3)
    # pass@k training: mean over all six pairs 1/2, deviation 1/2: (1 - 1/2) / (1/2) and (1/3 - 1/2) / (1/2)
    assert of_one_group(PassAtK(k=2), [1.0, 0.0, 0.0, 0.0]) == pytest.approx([1.0] + [-1 / 3] * 3)


def test_the_best_of_all_is_best_minus_second_best() -> None:
    assert of_one_group(MaxAtK(k=8), [0.3, 0.9, 0.5]) == pytest.approx([0.0, 3 * (0.9 - 0.5), 0.0])


@given(GROUP, st.integers(1, 8))
def test_closed_forms_are_the_sums_over_subsets(rewards: list[float], k: int) -> None:
    n = len(rewards)

    def best(count: int, *, without: int | None = None) -> list[tuple[float, Any]]:
        members = [i for i in range(n) if i != without]
        return [(max(rewards[i] for i in chosen), chosen) for chosen in itertools.combinations(members, count)]

    size, fewer = min(k, n), min(k, n - 1)
    with_i = [np.mean([top for top, chosen in best(size) if i in chosen]) for i in range(n)]
    assert of_one_group(MaxAtK(k=k, baseline="none"), rewards) == pytest.approx([size * mean for mean in with_i])
    loo = [
        fewer
        * (
            np.mean([top for top, chosen in best(fewer) if i in chosen])
            - np.mean([top for top, _ in best(fewer, without=i)])
        )
        for i in range(n)
    ]
    found = of_one_group(MaxAtK(k=k, baseline="loo"), rewards)
    assert found == pytest.approx(loo, abs=1e-12)
    assert sum(found) == pytest.approx(0.0, abs=1e-9)
    every = np.array([top for top, _ in best(size)])
    if every.std() > 1e-9:
        standard = [(mean - every.mean()) / every.std() for mean in with_i]
        assert of_one_group(PassAtK(k=k), rewards) == pytest.approx(standard, abs=1e-9)


@given(GROUP)
def test_at_one_it_is_rloo(rewards: list[float]) -> None:
    assert of_one_group(MaxAtK(k=1), rewards) == pytest.approx(of_one_group(Rloo(), rewards), abs=1e-12)


@pytest.mark.parametrize("rule", [Rloo(), MaxAtK(), MaxAtK(baseline="loo"), PassAtK(), Grpo(deviation="population")])
def test_equal_rewards_have_no_advantage(rule: Any) -> None:
    assert of_one_group(rule, [0.1] * 7) == pytest.approx([0.0] * 7, abs=1e-12)


def test_the_deviations_of_grpo() -> None:
    # two groups, rewards 1 0 | 1 1 0 0: the population's is 1/2 in both; all six rewards: sqrt(6 * (1/4) / 5)
    rewards, groups = np.array([1.0, 0.0, 1.0, 1.0, 0.0, 0.0]), np.array([0, 0, 1, 1, 1, 1])
    signs = np.array([1.0, -1.0, 1.0, 1.0, -1.0, -1.0])
    population, _ = Grpo(deviation="population", std_epsilon=1e-9).advantages(rewards, groups)
    np.testing.assert_allclose(population, signs, rtol=1e-8)
    batch, _ = Grpo(deviation="batch", std_epsilon=1e-9).advantages(rewards, groups)
    np.testing.assert_allclose(batch, 0.5 * signs / np.sqrt(6 / 4 / 5), rtol=1e-8)

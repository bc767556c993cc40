"""Laws of difficulty and of the advantages."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from aer_megatron.algo.advantage import group_advantages
from aer_megatron.algo.advantages.dr_grpo import DrGrpo
from aer_megatron.algo.advantages.grpo import Grpo
from aer_megatron.algo.difficulty import difficulty, normalize_difficulty
from aer_megatron.types import Experience

shapes = st.sampled_from(["linear_deficit", "threshold", "complement"])
accuracies = st.lists(st.floats(0, 1), min_size=1, max_size=30).map(np.array)
rhos = st.floats(0.01, 1)


@given(accuracies, shapes, rhos)
def test_difficulty_is_in_the_unit_interval_and_falls_with_accuracy(accuracy_P, shape, rho):
    d_P = difficulty(np.sort(accuracy_P), shape=shape, rho=rho)
    assert np.all((d_P >= 0) & (d_P <= 1))
    assert np.all(np.diff(d_P) <= 0)
    assert difficulty(np.zeros(1), shape=shape, rho=rho)[0] == 1


@given(accuracies, shapes, rhos, st.floats(1e-3, 0.5))
def test_normalised_difficulty_keeps_proportions_within_mean_one_and_the_floors_bound(accuracy_P, shape, rho, floor):
    d_P = difficulty(accuracy_P, shape=shape, rho=rho)
    normalised_P = normalize_difficulty(d_P, mode="mean", floor=floor)
    np.testing.assert_allclose(normalised_P.mean(), min(1.0, d_P.mean() / floor), rtol=1e-12)
    np.testing.assert_allclose(normalised_P * max(d_P.mean(), floor), d_P, rtol=1e-12)
    assert np.all(normalised_P <= 1 / floor)


@given(accuracies, shapes, rhos)
def test_without_a_floor_the_normalised_mean_is_one(accuracy_P, shape, rho):
    d_P = difficulty(accuracy_P, shape=shape, rho=rho)
    normalised_P = normalize_difficulty(d_P, mode="mean", floor=0.0)
    if d_P.mean() > 1e-12:
        np.testing.assert_allclose(normalised_P.mean(), 1, rtol=1e-12)
    else:
        np.testing.assert_array_equal(normalised_P, d_P)


@given(st.lists(st.lists(st.integers(0, 1), min_size=2, max_size=8), min_size=1, max_size=8), st.booleans())
def test_advantages_equal_numpy_group_by_group(groups, divide):
    sizes = [len(group) for group in groups]
    num_sequences = sum(sizes)
    group_index_B = np.repeat(np.arange(len(groups)), sizes)
    zeros = np.zeros(num_sequences, dtype=np.int64)
    batch = Experience(
        prompt_id_B=(group_index_B + 100).astype(np.uint64),
        group_index_B=group_index_B,
        prompt_length_B=zeros,
        response_length_B=zeros,
        token_ids_L=np.zeros(0, dtype=np.int64),
        rollout_logprob_T=np.zeros(0, dtype=np.float32),
        reward_B=np.concatenate(groups).astype(np.float64),
        truncated_B=zeros.astype(bool),
        policy_version_B=zeros,
        policy_version_sum_B=zeros,
    )
    result = group_advantages(batch, Grpo() if divide else DrGrpo())
    expected = []
    for group in groups:
        values = np.array(group, dtype=np.float64)
        expected.append((values - values.mean()) / (values.std(ddof=1) + 1e-6 if divide else 1.0))
    np.testing.assert_allclose(result.advantage_B, np.concatenate(expected), rtol=1e-12, atol=1e-12)
    assert result.successes_P.tolist() == [sum(group) for group in groups]
    assert result.accuracy_P.tolist() == [sum(group) / len(group) for group in groups]

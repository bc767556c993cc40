"""Group advantages through the C++ extension against numbers derived by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aer_megatron.algo.advantage import group_advantages, overlong_penalty
from aer_megatron.algo.advantages.dr_grpo import DrGrpo
from aer_megatron.algo.advantages.grpo import Grpo
from aer_megatron.algo.options import AlgoSection
from aer_megatron.types import Experience

HARD, EASY = 2**64 - 5, 17


def experience(rewards: list[float], groups: list[int], prompt_ids: list[int]) -> Experience:
    num_sequences = len(rewards)
    ones = np.ones(num_sequences, dtype=np.int64)
    return Experience(
        prompt_id_B=np.array(prompt_ids, dtype=np.uint64),
        group_index_B=np.array(groups, dtype=np.int64),
        prompt_length_B=ones,
        response_length_B=ones,
        token_ids_L=np.zeros(2 * num_sequences, dtype=np.int64),
        rollout_logprob_T=np.zeros(num_sequences, dtype=np.float32),
        reward_B=np.array(rewards, dtype=np.float64),
        truncated_B=np.zeros(num_sequences, dtype=bool),
        policy_version_B=np.zeros(num_sequences, dtype=np.int64),
        policy_version_sum_B=np.zeros(num_sequences, dtype=np.int64),
    )


def ragged() -> Experience:
    return experience([1, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1], [HARD] * 4 + [EASY] * 2)


def test_grpo_and_counts():
    # Group 0: rewards 1 0 0 0, mean 1/4, squares 9/16 + 3/16 = 12/16, unbiased variance (12/16)/3 = 1/4,
    # std 1/2. With eps = 0.5 the divisor is exactly 1: advantages 0.75 and three times -0.25.
    # Group 1: all equal, zeros.
    result = group_advantages(ragged(), Grpo(std_epsilon=0.5))
    np.testing.assert_allclose(result.advantage_B, [0.75, -0.25, -0.25, -0.25, 0, 0], rtol=1e-15)
    assert result.accuracy_P.tolist() == [0.25, 1.0]
    assert result.counts_P.tolist() == [4, 2]
    assert result.successes_P.tolist() == [1, 2]
    assert result.prompt_id_P.tolist() == [HARD, EASY]
    assert result.prompt_id_P.dtype == np.uint64


def test_default_epsilon_and_dr_grpo():
    # Rewards 1 0: mean 1/2, unbiased std sqrt(1/2).
    pair = experience([1, 0], [0, 0], [3, 3])
    expected = 0.5 / (math.sqrt(0.5) + 1e-6)
    np.testing.assert_allclose(group_advantages(pair, Grpo()).advantage_B, [expected, -expected], rtol=1e-14)
    plain = group_advantages(pair, DrGrpo()).advantage_B
    assert plain.tolist() == [0.5, -0.5]


def test_prompts_keep_the_order_of_their_group_numbers():
    # Group 1 comes first in the batch: P stays in the order of the group numbers.
    result = group_advantages(experience([1, 1, 0, 0], [1, 1, 0, 0], [8, 8, 9, 9]), Grpo())
    assert result.prompt_id_P.tolist() == [9, 8]
    assert result.accuracy_P.tolist() == [0.0, 1.0]


def test_partial_reward_is_not_a_success():
    result = group_advantages(experience([0.5, 0.999, 1.0, 0.0], [0] * 4, [1] * 4), Grpo())
    assert result.successes_P.tolist() == [1]
    assert result.accuracy_P.tolist() == [0.25]


def test_broken_groups_are_refused():
    batch = ragged()
    with pytest.raises(ValueError, match="without gaps"):
        group_advantages(replace(batch, group_index_B=batch.group_index_B * 2), Grpo())
    mixed = batch.prompt_id_B.copy()
    mixed[1] = EASY
    with pytest.raises(ValueError, match="differs within a group"):
        group_advantages(replace(batch, prompt_id_B=mixed), Grpo())


def test_overlong_penalty_grows_over_the_buffer():
    # max_new_tokens 10, buffer 4: free up to 6 tokens, then 1/4 of the penalty per token
    lengths = np.array([1, 6, 7, 8, 10])
    long = replace(experience([1, 0, 1, 0, 1], [0] * 5, [3] * 5), response_length_B=lengths)
    config = AlgoSection(overlong_buffer=4, overlong_penalty=0.5)
    penalty = overlong_penalty(long, config, max_new_tokens=10)
    assert penalty is not None and penalty.tolist() == [0, 0, 0.125, 0.25, 0.5]
    assert overlong_penalty(long, AlgoSection(), max_new_tokens=10) is None


def test_a_penalty_moves_the_advantage_and_no_verdict():
    # rewards 1 1 0 0, penalties 0 1/2 0 1/2: shaped 1 1/2 0 -1/2, mean 1/4
    group = experience([1, 1, 0, 0], [0] * 4, [3] * 4)
    shaped = group_advantages(group, DrGrpo(), penalty_B=np.array([0, 0.5, 0, 0.5]))
    assert shaped.advantage_B.tolist() == [0.75, 0.25, -0.25, -0.75]
    assert (shaped.successes_P.tolist(), shaped.accuracy_P.tolist()) == ([2], [0.5])
    assert group.reward_B.tolist() == [1, 1, 0, 0]
    # all right, one too long: 1 and 0.5 are told apart, and both still count as solved
    solved = group_advantages(experience([1, 1], [0, 0], [3, 3]), DrGrpo(), penalty_B=np.array([0.0, 0.5]))
    assert solved.advantage_B.tolist() == [0.25, -0.25]
    assert solved.successes_P.tolist() == [2]


# Laws


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

"""Difficulty, its normalisation and the ledger behind it against numbers derived by hand, and their laws."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aer_megatron._C import DifficultyLedger
from aer_megatron.algo.advantage import AdvantageResult
from aer_megatron.algo.difficulty import difficulty, normalize_difficulty
from aer_megatron.algo.ledger import difficulty_accuracy, group_token_entropy, update_ledger
from aer_megatron.algo.options import LedgerSection
from aer_megatron.types import Experience

ACCURACY = np.array([0.0, 0.125, 0.25, 0.5, 0.75, 1.0])


@pytest.mark.parametrize(
    ("shape", "rho", "expected"),
    [
        # (0.5 - g) / 0.5: 1, 0.75, 0.5, 0, then negative -> 0
        ("linear_deficit", 0.5, [1, 0.75, 0.5, 0, 0, 0]),
        # rho = 1 is the complement
        ("linear_deficit", 1.0, [1, 0.875, 0.75, 0.5, 0.25, 0]),
        ("threshold", 0.5, [1, 1, 1, 1, 0, 0]),  # g = rho counts as hard
        ("complement", 0.5, [1, 0.875, 0.75, 0.5, 0.25, 0]),
    ],
)
def test_shapes(shape, rho, expected):
    assert difficulty(ACCURACY, shape=shape, rho=rho).tolist() == expected


def test_bad_difficulty_input():
    for bad in ([-0.1], [1.1], [float("nan")]):
        with pytest.raises(ValueError, match="accuracy_P"):
            difficulty(np.array(bad), shape="complement", rho=0.5)
    for rho in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="rho="):
            difficulty(ACCURACY, shape="linear_deficit", rho=rho)
    with pytest.raises(ValueError, match="difficulty='cubic'"):
        difficulty(ACCURACY, shape="cubic", rho=0.5)
    with pytest.raises(ValueError, match="normalize='max'"):
        normalize_difficulty(ACCURACY, mode="max", floor=0.02)
    for floor in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="difficulty_floor"):
            normalize_difficulty(ACCURACY, mode="mean", floor=floor)


def test_normalisation():
    d_P = np.array([1.0, 0.5, 0.0, 0.5])  # mean 0.5
    for floor in (0.0, 0.02, 0.5):
        assert normalize_difficulty(d_P, mode="mean", floor=floor).tolist() == [2.0, 1.0, 0.0, 1.0]
        assert normalize_difficulty(d_P, mode="none", floor=floor).tolist() == d_P.tolist()
        assert normalize_difficulty(np.zeros(3), mode="mean", floor=floor).tolist() == [0, 0, 0]
        assert normalize_difficulty(np.zeros(0), mode="mean", floor=floor).shape == (0,)


def test_the_floor_bounds_the_share_of_a_lone_hard_prompt():
    alone_P = np.zeros(64)
    alone_P[7] = 1.0  # mean 1/64 = 0.015625
    assert normalize_difficulty(alone_P, mode="mean", floor=0.0)[7] == 64
    assert normalize_difficulty(alone_P, mode="mean", floor=0.02)[7] == 50  # 1 / 0.02
    assert normalize_difficulty(alone_P, mode="mean", floor=0.125).tolist() == [8.0 if i == 7 else 0 for i in range(64)]
    # half as hard, still below the floor: half the share, so the bonus fades instead of jumping
    assert normalize_difficulty(alone_P / 2, mode="mean", floor=0.125)[7] == 4


def two_prompts() -> Experience:
    """Prompt 7 with responses of 2 and 0 tokens, prompt 9 with responses of 1 and 3."""
    return Experience(
        prompt_id_B=np.array([7, 7, 9, 9], dtype=np.uint64),
        group_index_B=np.array([0, 0, 1, 1]),
        prompt_length_B=np.array([1, 1, 1, 1]),
        response_length_B=np.array([2, 0, 1, 3]),
        token_ids_L=np.zeros(10, dtype=np.int64),
        rollout_logprob_T=np.zeros(6, dtype=np.float32),
        reward_B=np.zeros(4),
        truncated_B=np.zeros(4, dtype=bool),
        policy_version_B=np.zeros(4, dtype=np.int64),
        policy_version_sum_B=np.zeros(4, dtype=np.int64),
    )


def test_group_token_entropy_sums_each_prompts_own_tokens():
    # tokens: prompt 7 has 0.5 0.25; prompt 9 has 1 | 2 4 8
    entropy_T = np.array([0.5, 0.25, 1, 2, 4, 8], dtype=np.float32)
    entropy_sum_P, token_count_P = group_token_entropy(two_prompts(), entropy_T)
    assert entropy_sum_P.tolist() == [0.75, 15.0]
    assert token_count_P.tolist() == [2, 4]
    assert (entropy_sum_P.dtype, token_count_P.dtype) == (np.float64, np.int64)
    with pytest.raises(ValueError, match="one value per sampled token, 6"):
        group_token_entropy(two_prompts(), entropy_T[:5])


def result_of(successes: list[int], counts: list[int], prompt_ids: list[int]) -> AdvantageResult:
    successes_P, counts_P = np.array(successes), np.array(counts)
    return AdvantageResult(
        advantage_B=np.zeros(int(counts_P.sum())),
        accuracy_P=successes_P / counts_P,
        counts_P=counts_P,
        successes_P=successes_P,
        prompt_id_P=np.array(prompt_ids, dtype=np.uint64),
    )


def test_ledger_posterior_as_the_source():
    config = LedgerSection(decay=0.5, prior_success=1.0, prior_failure=3.0)
    ledger = DifficultyLedger(config.decay, 16)
    nothing = {"entropy_sum_P": np.zeros(2), "token_count_P": np.zeros(2, dtype=np.int64)}
    update_ledger(ledger, result_of([8, 0], [8, 8], [7, 9]), **nothing, step=0)
    update_ledger(ledger, result_of([2, 4], [8, 8], [7, 9]), **nothing, step=1)
    # At step 1, decay 1/2. Prompt 7: successes 8/2 + 2 = 6, failures 0/2 + 6 = 6: (1 + 6) / (4 + 12) = 7/16.
    # Prompt 9: successes 0 + 4 = 4, failures 8/2 + 4 = 8: 5/16. Prompt 5 was never seen: the prior's 1/4.
    prompt_ids = np.array([7, 9, 5], dtype=np.uint64)
    group_mean_P = np.array([0.25, 0.5, 0.0])
    got = difficulty_accuracy("ledger", group_mean_P, ledger, prompt_ids, config, 1)
    np.testing.assert_allclose(got, [7 / 16, 5 / 16, 1 / 4], rtol=1e-9)
    assert difficulty_accuracy("group", group_mean_P, ledger, prompt_ids, config, 1) is group_mean_P
    with pytest.raises(ValueError, match="source='both'"):
        difficulty_accuracy("both", group_mean_P, ledger, prompt_ids, config, 1)


def test_ledger_receives_entropy_and_counts():
    ledger = DifficultyLedger(0.9, 16)
    update_ledger(
        ledger,
        result_of([1], [4], [7]),
        entropy_sum_P=np.array([2.5]),
        token_count_P=np.array([10]),
        step=3,
    )
    row = ledger.lookup(np.array([7], dtype=np.uint64))
    assert (row.attempts[0], row.successes[0], row.token_count[0], row.last_step[0]) == (4, 1, 10, 3)
    assert row.entropy_sum[0] == 2.5


# Laws

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

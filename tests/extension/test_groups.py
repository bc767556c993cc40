"""group_statistics against hand-derived numbers and NumPy; its refusals."""

import math

import numpy as np
import pytest

from aer_megatron._C import GroupStatistics, group_statistics
from tests.support.ledger_reference import reference_group_statistics


def test_hand_derived_numbers() -> None:
    # Group 7: rewards 1, 0, 0, 1 -> mean 1/2, unbiased variance 4 * (1/4) / 3 = 1/3. Group -3: one rollout.
    ids = np.array([7, -3, 7, 7, 7], dtype=np.int64)
    rewards = np.array([1.0, 1.0, 0.0, 0.0, 1.0])
    out = group_statistics(ids, rewards, std_epsilon=1e-6, divide_by_std=True)
    assert out.group_ids.tolist() == [7, -3]
    assert out.counts.tolist() == [4, 1]
    assert out.successes.tolist() == [2, 1]
    assert out.mean.tolist() == [0.5, 1.0]
    assert out.std == pytest.approx([math.sqrt(1 / 3), 0.0], rel=1e-15)
    unit = 0.5 / (math.sqrt(1 / 3) + 1e-6)
    assert out.advantage == pytest.approx([unit, 0.0, -unit, -unit, unit], rel=1e-14)
    assert out.group_index.tolist() == [0, 1, 0, 0, 0]


def test_without_std_is_the_centred_reward() -> None:
    out = group_statistics(
        np.array([1, 1, 1], dtype=np.int64), np.array([1.0, 0.0, 0.5]), std_epsilon=1e-6, divide_by_std=False
    )
    assert out.advantage.tolist() == [0.5, -0.5, 0.0]


@pytest.mark.parametrize("divide_by_std", [True, False])
def test_matches_numpy_on_ragged_interleaved_groups(divide_by_std: bool) -> None:
    rng = np.random.default_rng(3)
    ids = rng.integers(-40, 40, 3000)
    rewards = rng.choice([0.0, 1.0, 0.25, 1.5, -0.5], 3000)
    out = group_statistics(ids, rewards, std_epsilon=1e-4, divide_by_std=divide_by_std)
    expected = reference_group_statistics(ids, rewards, std_epsilon=1e-4, divide_by_std=divide_by_std)
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(out, name), value, rtol=1e-12, atol=1e-13, err_msg=name)
        assert getattr(out, name).dtype == value.dtype


@pytest.mark.parametrize("reward", [0.1, 1 / 3, 1e9 + 0.1])
def test_equal_rewards_have_exactly_no_advantage(reward: float) -> None:
    out = group_statistics(np.zeros(7, dtype=np.int64), np.full(7, reward), std_epsilon=0.0, divide_by_std=True)
    assert out.std.tolist() == [0.0]
    assert out.advantage.tolist() == [0.0] * 7


def test_success_is_a_reward_of_at_least_one() -> None:
    rewards = np.array([1.0, np.nextafter(1.0, 0.0), 2.0, 0.0])
    out = group_statistics(np.zeros(4, dtype=np.int64), rewards, std_epsilon=1e-6, divide_by_std=True)
    assert out.successes.tolist() == [2]


def test_no_rollouts_give_no_groups() -> None:
    out = group_statistics(np.array([], dtype=np.int64), np.array([]), std_epsilon=1e-6, divide_by_std=True)
    assert len(out.group_ids) == len(out.advantage) == 0


def test_ids_at_the_ends_of_the_range() -> None:
    ids = np.array([2**63 - 1, -(2**63), 2**63 - 1], dtype=np.int64)
    out = group_statistics(ids, np.array([1.0, 0.0, 0.0]), std_epsilon=1e-6, divide_by_std=False)
    assert out.group_ids.tolist() == [2**63 - 1, -(2**63)]
    assert out.counts.tolist() == [2, 1]


@pytest.mark.parametrize(
    ("ids", "rewards", "epsilon", "error", "text"),
    [
        (np.zeros(2, np.int64), np.zeros(3), 1e-6, ValueError, "2 group_ids but 3 rewards"),
        (np.zeros(2, np.int32), np.zeros(2), 1e-6, TypeError, r"group_ids must be .* int64 .* dtype int32"),
        (np.zeros(2, np.int64), np.zeros(2, np.float32), 1e-6, TypeError, r"rewards must be .* float64"),
        (np.zeros((2, 2), np.int64), np.zeros(4), 1e-6, ValueError, "2 dimensions"),
        (np.zeros(4, np.int64)[::2], np.zeros(2), 1e-6, ValueError, "ascontiguousarray"),
        ([0, 1], np.zeros(2), 1e-6, TypeError, "group_ids must be .* got list"),
        (
            np.zeros(2, np.int64),
            np.array([0.0, np.nan]),
            1e-6,
            ValueError,
            r"rewards\[1\]=nan must be finite",
        ),
        (
            np.zeros(2, np.int64),
            np.array([np.inf, 0.0]),
            1e-6,
            ValueError,
            r"rewards\[0\]=inf must be finite",
        ),
        (np.zeros(2, np.int64), np.zeros(2), -1.0, ValueError, "std_epsilon=-1 must be finite and >= 0"),
    ],
)
def test_refuses(ids, rewards, epsilon, error, text) -> None:
    with pytest.raises(error, match=text):
        group_statistics(ids, rewards, std_epsilon=epsilon, divide_by_std=True)


def test_statistics_cannot_be_made_or_changed_by_hand() -> None:
    with pytest.raises(TypeError):
        GroupStatistics()
    out = group_statistics(np.zeros(1, np.int64), np.zeros(1), std_epsilon=1e-6, divide_by_std=True)
    with pytest.raises(AttributeError):
        out.mean = np.zeros(1)  # type: ignore[misc]

"""The interval of the mean pass@k: how often it holds the truth, and what it says where there is little to go by.

All cells: benchmarks/bench_pass_interval.py.
"""

from __future__ import annotations

import numpy as np
import pytest

from aer_megatron.algo.passk import mean_interval, pass_at_k, pass_interval, t_quantile


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


@pytest.mark.parametrize(
    ("rate", "total", "k"), [(0.1, 1, 1), (0.1, 2, 1), (0.2, 200, 1), (0.3, 2, 8), (0.5, 2, 1), (0.2, 8, 8)]
)
def test_holds_the_truth_in_95_percent(rate, total, k):
    # the true mean of 1 - (1 - q)^k over Beta(a, b): 1 - prod (b + i) / (a + b + i)
    a, b = rate * total, (1 - rate) * total
    truth = 1 - np.prod([(b + i) / (total + i) for i in range(k)])
    random = np.random.default_rng(0)
    repetitions = 3000  # a standard error of 0.4 %
    correct_RP = random.binomial(16, random.beta(a, b, (repetitions, 30)))
    samples_P = np.full(30, 16)
    held = 0
    for correct_P in correct_RP:
        low, high = pass_interval(samples_P, correct_P, k=k)
        held += low <= truth <= high
    assert abs(held / repetitions - 0.95) <= 0.015


def test_is_that_of_a_proportion_where_problems_are_solved_always_or_never():
    # 6 of 30, and one more of each kind: 7 of 32, Student's t with 31 degrees of freedom
    low, high = pass_interval(np.full(30, 16), np.where(np.arange(30) < 6, 16, 0), k=1)
    share = 7 / 32
    half = 2.039513 * (share * (1 - share) / 31) ** 0.5
    np.testing.assert_allclose((low, high), (share - half, share + half), rtol=1e-6)


def test_none_and_all_are_not_taken_for_certain():
    none, every = (pass_interval(np.full(30, 16), np.full(30, correct), k=4) for correct in (0, 16))
    assert none[0] == 0
    assert 0.05 < none[1] < 0.12  # the rule of three: 3 / 30
    np.testing.assert_allclose(every, (1 - none[1], 1 - none[0]))


def test_one_problem_or_none_says_nothing():
    assert pass_interval(ints(), ints(), k=1) == (0.0, 1.0)
    for correct in (0, 7, 16):
        assert pass_interval(ints(16), ints(correct), k=1) == (0.0, 1.0)


def test_equal_values_have_the_width_of_chance():
    low, high = pass_interval(np.full(30, 16), np.full(30, 8), k=1)
    assert 0.02 < high - low < 0.1
    again = mean_interval(pass_at_k(np.full(30, 16), np.full(30, 8), k=1), np.full(30, 16))
    assert again == (low, high)


def test_quantiles_of_student():
    # of any table: two-sided 5 %
    table = {1: 12.70620, 2: 4.30265, 5: 2.57058, 29: 2.04523, 120: 1.97993, 5000: 1.96044}
    np.testing.assert_allclose([t_quantile(freedom) for freedom in table], list(table.values()), rtol=2e-6)

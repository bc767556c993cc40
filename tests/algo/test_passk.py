"""pass@k against numbers derived by hand and against enumeration."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aer_megatron.algo.passk import pass_at_k


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def test_hand_derived():
    # n = 5, c = 2, k = 2: 1 - C(3,2)/C(5,2) = 1 - 3/10. n = 4, c = 1, k = 2: 1 - C(3,2)/C(4,2) = 1 - 3/6.
    # c = 0: 0. c = n: 1. n = 3, c = 2, k = 2: one wrong answer cannot fill two draws: 1.
    got = pass_at_k(ints(5, 4, 6, 6, 3), ints(2, 1, 0, 6, 2), k=2)
    np.testing.assert_allclose(got, [0.7, 0.5, 0.0, 1.0, 1.0], rtol=1e-15)
    # k = 1 is the accuracy; k = n is "any correct".
    np.testing.assert_allclose(pass_at_k(ints(8, 8), ints(3, 0), k=1), [0.375, 0.0], rtol=1e-15)
    assert pass_at_k(ints(32, 32), ints(1, 0), k=32).tolist() == [1.0, 0.0]


def test_large_counts_do_not_overflow():
    # C(10000, 5000) has 3000 digits. With c = 1, pass@k = k / n.
    got = pass_at_k(ints(10_000), ints(1), k=5_000)
    np.testing.assert_allclose(got, [0.5], rtol=1e-12)


def test_bad_input_names_the_rule():
    with pytest.raises(ValueError, match="k=9 needs at least k samples"):
        pass_at_k(ints(16, 8), ints(1, 1), k=9)
    with pytest.raises(ValueError, match="k=0 must be at least 1"):
        pass_at_k(ints(8), ints(1), k=0)
    for correct in (9, -1):
        with pytest.raises(ValueError, match="num_correct_P"):
            pass_at_k(ints(8), ints(correct), k=1)
    with pytest.raises(ValueError, match="equal and 1-D"):
        pass_at_k(ints(8), ints(1, 2), k=1)


def test_no_prompts_give_no_values():
    assert pass_at_k(ints(), ints(), k=3).shape == (0,)


# Laws: the fraction of k-subsets that hold a correct sample, and monotone


@st.composite
def counts(draw, largest: int):
    n = draw(st.integers(1, largest))
    return n, draw(st.integers(0, n)), draw(st.integers(1, n))


def one(n: int, c: int, k: int) -> float:
    return float(pass_at_k(np.array([n]), np.array([c]), k=k)[0])


@given(counts(9))
def test_equals_enumeration_of_subsets(case):
    n, c, k = case
    subsets = list(combinations(range(n), k))  # samples 0..c-1 are the correct ones
    expected = sum(any(sample < c for sample in subset) for subset in subsets) / len(subsets)
    np.testing.assert_allclose(one(n, c, k), expected, rtol=1e-12, atol=1e-12)


@given(counts(200))
def test_bounded_and_monotone_in_k_and_in_c(case):
    n, c, k = case
    value = one(n, c, k)
    assert 0 <= value <= 1
    if k < n:
        assert one(n, c, k + 1) >= value
    if c < n:
        assert one(n, c + 1, k) >= value


@given(st.lists(counts(50), min_size=1, max_size=20))
def test_a_batch_equals_its_prompts_one_by_one(cases):
    k = min(case[2] for case in cases)
    n_P = np.array([n for n, _, _ in cases])
    c_P = np.array([c for _, c, _ in cases])
    assert pass_at_k(n_P, c_P, k=k).tolist() == [one(n, c, k) for n, c, _ in cases]

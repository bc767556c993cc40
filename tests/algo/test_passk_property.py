"""pass@k is the fraction of k-subsets that hold a correct sample, and monotone."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from aer_megatron.algo.passk import pass_at_k


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

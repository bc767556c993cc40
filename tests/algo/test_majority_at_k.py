"""maj@k is the share of k-subsets whose most frequent answer is right; ties share the vote."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aer_megatron.algo.passk import majority_at_k


def one(n: int, sizes: list[int], right: int | None, k: int) -> float:
    return float(majority_at_k(np.array([n]), [sizes], [right], k=k)[0])


@st.composite
def answers(draw):
    n = draw(st.integers(1, 9))
    sizes: list[int] = []
    for size in draw(st.lists(st.integers(1, 9), max_size=6)):
        if sum(sizes) + size <= n:
            sizes.append(size)
    right = draw(st.sampled_from([None, *range(len(sizes))]))
    return n, sizes, right, draw(st.integers(1, n))


@given(answers())
def test_equals_enumeration_of_subsets(case):
    n, sizes, right, k = case
    silent = [-1] * (n - sum(sizes))
    labels = [index for index, size in enumerate(sizes) for _ in range(size)] + silent
    won = 0.0
    for subset in combinations(labels, k):
        votes = Counter(label for label in subset if label >= 0)
        best = [label for label, count in votes.items() if count == max(votes.values())]
        won += (right in best) / max(1, len(best))
    np.testing.assert_allclose(one(n, sizes, right, k), won / comb(n, k), rtol=1e-12, atol=1e-12)


def test_hand_derived():
    # 3 right, 2 wrong alike, k = 2: both right 3/10, one of each 6/10 (a tie: half), both wrong 1/10
    np.testing.assert_allclose(one(5, [3, 2], 0, 2), 0.3 + 0.6 / 2, rtol=1e-12)
    # the same with the wrong ones without an answer: they have no vote
    np.testing.assert_allclose(one(5, [3], 0, 2), 0.9, rtol=1e-12)
    assert one(4, [], None, 2) == 0.0


def test_one_sample_is_the_accuracy_and_all_are_the_majority():
    np.testing.assert_allclose(one(64, [10, 30, 3], 0, 1), 10 / 64, rtol=1e-12)
    assert one(64, [10, 30, 3], 0, 64) == 0.0
    assert one(64, [10, 30, 3], 1, 64) == 1.0
    assert one(64, [30, 30, 4], 1, 64) == 0.5


def test_many_classes_and_large_counts():
    # three classes alike share every vote, also where counts overflow a float: C(3000, 300) has 423 digits
    np.testing.assert_allclose(one(192, [64, 64, 64], 0, 60), 1 / 3, rtol=1e-9)
    np.testing.assert_allclose(one(3000, [1500, 1500], 1, 300), 0.5, rtol=1e-9)
    assert 0.99999 < one(64, [32] + [1] * 32, 0, 32) <= 1


def test_bad_input_names_the_rule():
    for arguments, message in (
        ((4, [2], 0, 5), "k=5 must lie in 1..4"),
        ((4, [2, 3], 0, 1), "at most 4 together"),
        ((4, [0], 0, 1), "at least 1"),
        ((4, [2], 1, 1), "right=1 must be one of 1"),
    ):
        with pytest.raises(ValueError, match=message):
            one(*arguments)
    with pytest.raises(ValueError, match="equally many"):
        majority_at_k(np.array([4]), [], [], k=1)

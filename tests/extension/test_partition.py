"""balanced_partition against brute force and its guarantees."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aer_megatron._C import balanced_partition


def heaviest(weights: np.ndarray, parts: np.ndarray, num_parts: int) -> int:
    return int(np.bincount(parts, weights=weights, minlength=num_parts).max())


def optimum(weights: list[int], num_parts: int, equal_size: bool) -> int:
    best = sum(weights)
    for choice in itertools.product(range(num_parts), repeat=len(weights)):
        sizes = np.bincount(choice, minlength=num_parts)
        if equal_size and sizes.max() - sizes.min() > 1:
            continue
        best = min(best, heaviest(np.array(weights), np.array(choice), num_parts))
    return best


def test_hand_derived_example() -> None:
    # Differencing 8 7 6 5 4: 8-7=1, 6-5=1, 4-1=3, 3-1=2: sums 16 and 14.
    parts = balanced_partition(np.array([8, 7, 6, 5, 4]), 2, equal_size=False)
    assert sorted(np.bincount(parts, weights=[8, 7, 6, 5, 4]).tolist()) == [14, 16]


@pytest.mark.parametrize("equal_size", [False, True])
def test_close_to_the_optimum_on_small_cases(equal_size: bool) -> None:
    rng = np.random.default_rng(1)
    for _ in range(40):
        weights = rng.integers(1, 40, 7)
        best = optimum(weights.tolist(), 3, equal_size)
        got = heaviest(weights, balanced_partition(weights, 3, equal_size=equal_size), 3)
        assert best <= got <= 4 / 3 * best


@settings(deadline=None)
@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=60), st.integers(1, 60), st.booleans())
def test_every_part_is_used_numbered_by_first_sequence_and_balanced(
    weights: list[int], num_parts: int, equal_size: bool
) -> None:
    num_parts = min(num_parts, len(weights))
    array = np.array(weights, dtype=np.int64)
    parts = balanced_partition(array, num_parts, equal_size=equal_size)
    assert list(dict.fromkeys(parts.tolist())) == list(range(num_parts))
    sizes = np.bincount(parts)
    if equal_size:
        assert sizes.max() - sizes.min() <= 1
    else:
        sums = [sum(w for w, p in zip(weights, parts) if p == part) for part in range(num_parts)]
        assert max(sums) <= sum(weights) / num_parts + max(weights)
    assert parts.tolist() == balanced_partition(array, num_parts, equal_size=equal_size).tolist()


def test_long_tail_of_lengths_is_balanced_to_a_permille() -> None:
    weights = np.minimum(np.random.default_rng(2).geometric(1 / 700, 512), 8192)
    for equal_size in (False, True):
        parts = balanced_partition(weights, 16, equal_size=equal_size)
        assert heaviest(weights, parts, 16) <= 1.001 * weights.sum() / 16


@pytest.mark.parametrize(
    ("weights", "num_parts", "error", "text"),
    [
        (np.array([1, 2]), 3, ValueError, r"num_parts=3 must be in \[1, 2\]"),
        (np.array([1, 2]), 0, ValueError, "num_parts=0"),
        (np.array([1, -2]), 1, ValueError, r"weights\[1\]=-2"),
        (np.array([2**62, 2**62]), 1, ValueError, "64 bits"),
        (np.array([1.0]), 1, TypeError, "weights must be .* int64"),
    ],
)
def test_refuses(weights: np.ndarray, num_parts: int, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        balanced_partition(weights, num_parts, equal_size=False)

"""pass@k against numbers derived by hand."""

from __future__ import annotations

import numpy as np
import pytest

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

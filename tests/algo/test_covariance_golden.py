"""The tokens that Clip-Cov and KL-Cov pick, against numbers derived by hand."""

from __future__ import annotations

import numpy as np
import pytest

from aer_megatron.algo.covariance import token_covariance, token_quota
from aer_megatron.algo.policy_losses.base import PolicyLoss
from aer_megatron.algo.policy_losses.clip_cov import ClipCov
from aer_megatron.algo.policy_losses.kl_cov import KlCov

# mean A = 0; mean logp = -3, deviations 2, 0, 1, -3: C = 2, 0, -1, 3
ADVANTAGE = np.array([1.0, 1.0, -1.0, -1.0])
LOGPROB = np.array([-1.0, -3.0, -2.0, -6.0], dtype=np.float32)


def select(rule: PolicyLoss, old=LOGPROB) -> list[int]:
    return np.flatnonzero(rule.select(ADVANTAGE, LOGPROB, old, key=(0, 0))).tolist()


def test_covariance():
    assert token_covariance(ADVANTAGE, LOGPROB).tolist() == [2, 0, -1, 3]
    # means that are not zero: A 4 0, logp -1 -3 -> (2)(1), (-2)(-1)
    assert token_covariance(np.array([4.0, 0.0]), np.array([-1.0, -3.0])).tolist() == [2, 2]
    assert token_covariance(np.zeros(0), np.zeros(0)).tolist() == []


@pytest.mark.parametrize(("fraction", "expected"), [(1e-3, [3]), (0.25, [3]), (0.74, [0, 3]), (0.75, [0, 1, 3])])
def test_kl_cov_takes_the_highest(fraction, expected):
    assert select(KlCov(fraction=fraction)) == expected


def test_kl_cov_takes_the_earlier_of_equals():
    rule = KlCov(fraction=0.25)
    tied = rule.select(np.array([1.0, -1, 1, -1]), np.array([0.0, -1, 0, -1]), np.zeros(4), key=(0, 0))
    assert tied.tolist() == [True, False, False, False]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1.0, 5.0, [0, 3]),  # fewer candidates than the quota of 4: all of them
        (2.0, 5.0, [3]),  # the bounds are strict
        (1.0, 3.0, [0]),
        (-0.5, 0.5, [1]),
        (3.5, 5.0, []),
    ],
)
def test_clip_cov_picks_between_its_bounds(low, high, expected):
    assert select(ClipCov(fraction=1.0, covariance_low=low, covariance_high=high)) == expected


def test_clip_cov_picks_one_candidate_at_least_and_none_where_there_is_none():
    one = select(ClipCov())
    assert len(one) == 1 and set(one) <= {0, 3}
    assert select(ClipCov(covariance_low=4.0)) == []


def test_clip_cov_leaves_out_what_the_ratio_clips():
    rule = ClipCov(fraction=1.0)
    # token 3 has A < 0: a ratio of e^-1 < 0.8 is clipped, e^+1 is not; token 0 has A > 0: e^+1 > 1.2 is clipped
    shift = np.array([0.0, 0.0, 0.0, 1.0], dtype=np.float32)
    assert select(rule, old=LOGPROB + shift) == [0]
    assert select(rule, old=LOGPROB - shift) == [0, 3]
    assert select(rule, old=LOGPROB - shift[::-1]) == [3]


def test_quota():
    # 0.29 * 100 is 28.999999999999996 in binary
    cases = [(100, 0.29), (9999, 2e-4), (1, 1.0), (0, 0.5), (3, 1e-9)]
    assert [token_quota(size, fraction) for size, fraction in cases] == [29, 1, 1, 0, 1]

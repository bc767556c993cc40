"""The covariance rules' selection against numbers derived by hand, and its laws."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aer_megatron.algo.covariance import highest_covariance, random_subset, token_covariance, token_quota
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


# Laws of the selection

seeds = st.integers(0, 2**31)
sizes = st.integers(1, 300)
fractions = st.floats(1e-4, 1.0)


@settings(deadline=None)
@given(seeds, sizes, fractions)
def test_the_highest_are_no_lower_than_the_rest(seed, size, fraction):
    covariance = np.random.default_rng(seed).normal(size=size).round(1)  # rounded: with ties
    selected = highest_covariance(covariance, fraction=fraction)
    assert selected.sum() == token_quota(size, fraction)
    assert covariance[selected].min() >= covariance[~selected].max(initial=-np.inf)


@settings(deadline=None)
@given(seeds, sizes, fractions, st.floats(0, 1))
def test_a_random_subset_is_one_of_candidates(seed, size, fraction, share):
    candidate = np.random.default_rng(seed).random(size) < share
    selected = random_subset(candidate, fraction=fraction, key=(seed, 3))
    assert not (selected & ~candidate).any()
    assert selected.sum() == min(candidate.sum(), token_quota(size, fraction))
    np.testing.assert_array_equal(selected, random_subset(candidate, fraction=fraction, key=(seed, 3)))


@settings(deadline=None)
@given(seeds, st.integers(2, 300), fractions, st.integers(0, 299))
def test_one_candidate_more_moves_at_most_one_pick(seed, size, fraction, place):
    candidate = np.random.default_rng(seed).random(size) < 0.5
    changed = candidate.copy()
    changed[place % size] ^= True
    before, after = (random_subset(c, fraction=fraction, key=(seed, 0)) for c in (candidate, changed))
    assert (before & ~after).sum() <= 1
    assert (after & ~before).sum() <= 1


def test_every_candidate_is_as_likely_and_every_key_draws_anew():
    candidate = np.zeros(40, dtype=bool)
    candidate[::4] = True
    picks = np.array([random_subset(candidate, fraction=0.05, key=(7, update)) for update in range(2000)])
    assert (picks.sum(axis=1) == 2).all()
    share = picks.mean(axis=0)[candidate]  # 2 of 10: mean 0.2, standard error sqrt(0.16 / 2000) = 0.009
    assert np.abs(share - 0.2).max() < 0.045
    assert not (picks == [random_subset(candidate, fraction=0.05, key=(8, update)) for update in range(2000)]).all()


@settings(deadline=None)
@given(seeds, sizes)
def test_the_mean_is_the_covariance_and_shifts_do_not_matter(seed, size):
    rng = np.random.default_rng(seed)
    advantage, logprob = rng.normal(size=size), rng.normal(size=size)
    covariance = token_covariance(advantage, logprob)
    np.testing.assert_allclose(covariance.mean(), np.cov(advantage, logprob, bias=True)[0, 1], atol=1e-12)
    np.testing.assert_allclose(token_covariance(advantage + 3, logprob - 5), covariance, atol=1e-11)

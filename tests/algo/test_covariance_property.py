"""Laws of the covariance rules' selection."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from aer_megatron.algo.covariance import highest_covariance, random_subset, token_covariance, token_quota

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

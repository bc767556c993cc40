"""Prompt selection: the Beta posterior against exact sums, what is skipped, and who agrees about it."""

from __future__ import annotations

from fractions import Fraction
from math import comb

import numpy as np
import pytest

from aer_megatron._C import DifficultyLedger
from aer_megatron.algo.options import LedgerSection, SelectionSection
from aer_megatron.algo.selection import beta_cdf, decided_probability, exploration_draw, skip_decided

PRIOR = LedgerSection(decay=0.5)


def exact_beta_cdf(x: Fraction, a: int, b: int) -> float:
    """I_x(a, b) of whole a, b: the probability of at least a successes in a + b - 1 trials."""
    n = a + b - 1
    return float(sum((comb(n, j) * x**j * (1 - x) ** (n - j) for j in range(a, n + 1)), Fraction(0)))


@pytest.mark.parametrize("x", [Fraction(1, 20), Fraction(1, 10), Fraction(1, 2), Fraction(19, 20)])
@pytest.mark.parametrize(("a", "b"), [(1, 1), (1, 9), (9, 1), (3, 4), (40, 2), (120, 80), (2, 400)])
def test_beta_cdf_is_the_binomial_tail(x: Fraction, a: int, b: int) -> None:
    got = beta_cdf(np.array([float(x)]), np.array([float(a)]), np.array([float(b)]))[0]
    assert got == pytest.approx(exact_beta_cdf(x, a, b), rel=1e-11, abs=1e-15)


def test_beta_cdf_at_the_ends_and_of_many_rollouts() -> None:
    a, b = np.array([2.0, 2.0, 1e6]), np.array([3.0, 3.0, 1e6])
    # a symmetric distribution has half of its mass below 1/2
    np.testing.assert_allclose(beta_cdf(np.array([0.0, 1.0, 0.5]), a, b), [0.0, 1.0, 0.5], atol=1e-9)
    half = beta_cdf(np.array([0.5]), np.array([0.5]), np.array([0.5]))  # the arcsine law
    assert half[0] == pytest.approx(0.5, abs=1e-14)
    with pytest.raises(ValueError, match="beta_cdf"):
        beta_cdf(np.array([0.5]), np.array([0.0]), np.array([1.0]))


def test_decided_probabilities_of_all_right_and_all_wrong() -> None:
    # Beta(n + 1, 1) has the distribution function x^(n + 1)
    always, never = decided_probability(np.array([22.0, 1.0]), np.array([1.0, 22.0]), margin=0.1)
    np.testing.assert_allclose(always, [1 - 0.9**22, 0.1**22], rtol=1e-12)
    np.testing.assert_allclose(never, [0.1**22, 1 - 0.9**22], rtol=1e-12)


def ledger_of(counts: dict[int, tuple[int, int]], step: int) -> DifficultyLedger:
    """A ledger in which each prompt has (attempts, successes) at ``step``."""
    ledger = DifficultyLedger(PRIOR.decay, 0)
    ids = np.array(list(counts), dtype=np.uint64)
    attempts = np.array([a for a, _ in counts.values()])
    successes = np.array([s for _, s in counts.values()])
    ledger.update(ids, attempts, successes, np.zeros(len(ids)), attempts, step=step)
    return ledger


def skipped(ledger: DifficultyLedger, ids: list[int], step: int, **options: object) -> list[bool]:
    selection = SelectionSection.model_validate(
        {"kind": "skip_decided", "exploration": 1e-12, "min_attempts": 16, "margin": 0.1, "confidence": 0.9} | options
    )
    prompt_ids = np.array(ids, dtype=np.uint64)
    return skip_decided(ledger, prompt_ids, selection=selection, prior=PRIOR, seed=3, step=step).tolist()


def test_only_decided_prompts_with_enough_rollouts_are_skipped() -> None:
    ledger = ledger_of({1: (32, 32), 2: (32, 0), 3: (32, 16), 4: (15, 15), 5: (32, 31)}, step=4)
    # 1 - 0.9^33 = 0.97 for all of 32; Beta(32, 2) has 0.86 above 0.9; 9 is unknown
    assert skipped(ledger, [1, 2, 3, 4, 5, 9], step=4) == [True, True, False, False, False, False]
    assert skipped(ledger, [1, 5], step=4, confidence=0.8) == [True, True]
    assert skipped(ledger, [1, 2], step=4, min_attempts=33) == [False, False]
    assert skipped(ledger, [1, 2], step=4, kind="none") == [False, False]


def test_old_evidence_fades_until_the_prompt_comes_back() -> None:
    ledger = ledger_of({1: (32, 32)}, step=4)
    # 16 rollouts' worth after one step of decay 0.5: 1 - 0.9^17 = 0.83
    assert skipped(ledger, [1], step=5, confidence=0.8) == [True]
    assert skipped(ledger, [1], step=5) == [False]
    with pytest.raises(ValueError, match="step=3 is before"):
        skipped(ledger, [1], step=3)


def test_exploration_takes_its_share_and_does_not_depend_on_company_or_order() -> None:
    ledger = ledger_of(dict.fromkeys(range(4000), (64, 64)), step=0)
    every = skipped(ledger, list(range(4000)), step=0, exploration=0.25)
    assert 0.22 < 1 - np.mean(every) < 0.28
    assert skipped(ledger, list(range(3999, -1, -1)), step=0, exploration=0.25) == every[::-1]
    assert [skipped(ledger, [i], step=0, exploration=0.25)[0] for i in range(50)] == every[:50]
    assert skipped(ledger, list(range(100)), step=0, exploration=1.0) == [False] * 100


def test_draws_differ_by_seed_step_and_prompt() -> None:
    draws = [
        exploration_draw(prompt, seed=seed, step=step)
        for prompt in (1, 2**64 - 1)
        for seed in (0, 7)
        for step in (0, 1)
    ]
    assert len(set(draws)) == 8
    assert all(0 <= draw < 1 for draw in draws)

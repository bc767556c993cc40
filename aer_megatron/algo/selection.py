"""Prompt selection: which prompts a run may skip because their outcome is already known.

    ledger evidence of a prompt --Beta posterior--> P(accuracy > 1 - margin), P(accuracy < margin)
        --confidence--> "always solved" or "never solved" --exploration--> skipped, except a random share

A group whose rollouts are all right or all wrong has zero advantage: its tokens cost generation and teach nothing but
the entropy bonus. Evidence fades by ``algo.ledger.decay`` per step of age, so that a skipped prompt comes back by
itself; with a decay that forgets within an epoch nothing is ever skipped.

Shape suffix: P prompts. Pure functions: the same ledger, seed and step give the same answer on every rank and after a
resume. This file does NOT know the cursor that asks (data/prompts.py) or when it asks (loop/synchronous.py).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from aer_megatron._C import DifficultyLedger
from aer_megatron.algo.options import LedgerSection, SelectionSection
from aer_megatron.types import Float64Array, UInt64Array

# Keys the exploration draws apart from every other use of the run's seed.
_EXPLORATION_STREAM = 0x5E1EC7
# The continued fraction needs some sqrt(max(a, b)) terms: these are enough for 10^8 rollouts of one prompt.
_MAX_TERMS = 100_000
_TINY = 1e-300


def skip_decided(
    ledger: DifficultyLedger,
    prompt_id_P: UInt64Array,
    *,
    selection: SelectionSection,
    prior: LedgerSection,
    seed: int,
    step: int,
) -> NDArray[np.bool_]:
    """Returns whether each prompt is skipped at ``step``, bool [P].

    Skipped is a prompt with at least ``min_attempts`` rollouts ever whose posterior says "always" or "never" with
    probability above ``confidence``, unless its exploration draw takes it all the same; ``kind = "none"`` skips none.

    Raises:
        ValueError: the ledger has evidence from after ``step``.
    """
    if selection.kind == "none":
        return np.zeros(len(prompt_id_P), dtype=np.bool_)
    # each prompt's posterior at this step
    rows = ledger.lookup(prompt_id_P)
    age_P = np.where(rows.last_step < 0, 0, step - rows.last_step)
    if np.any(age_P < 0):
        raise ValueError(f"step={step} is before the ledger's step {int(rows.last_step.max())}; pass a later step")
    factor_P = ledger.decay ** age_P.astype(np.float64)
    always_P, never_P = decided_probability(
        prior.prior_success + rows.decayed_successes * factor_P,
        prior.prior_failure + rows.decayed_failures * factor_P,
        margin=selection.margin,
    )
    decided_P = np.maximum(always_P, never_P) > selection.confidence
    decided_P &= rows.attempts >= selection.min_attempts
    # some of the decided ones are taken all the same, in case the policy has changed
    skipped_P: NDArray[np.bool_] = decided_P.copy()
    for index in np.flatnonzero(decided_P):
        draw = exploration_draw(int(prompt_id_P[index]), seed=seed, step=step)
        skipped_P[index] = draw >= selection.exploration
    return skipped_P


def decided_probability(
    success_P: Float64Array, failure_P: Float64Array, *, margin: float
) -> tuple[Float64Array, Float64Array]:
    """Returns (P(accuracy > 1 - margin), P(accuracy < margin)) under Beta(success, failure), float64 [P] each."""
    margin_P = np.full(len(success_P), margin)
    # the first is the second of the mirrored distribution: no cancellation of 1 - (nearly 1)
    return beta_cdf(margin_P, failure_P, success_P), beta_cdf(margin_P, success_P, failure_P)


def beta_cdf(x_P: Float64Array, a_P: Float64Array, b_P: Float64Array) -> Float64Array:
    """Returns I_x(a, b), the distribution function of Beta(a, b) at x, float64 [P].

    The continued fraction of DLMF 8.17.22 by Lentz's method (Thompson and Barnett 1986); beyond the mean, where it does
    not converge, by the symmetry I_x(a, b) = 1 - I_{1-x}(b, a).

    Raises:
        ValueError: an x is outside [0, 1] or a parameter is not positive and finite.
    """
    parameters = np.concatenate([a_P, b_P])
    if not (np.all((x_P >= 0) & (x_P <= 1)) and np.all((parameters > 0) & np.isfinite(parameters))):
        raise ValueError(f"beta_cdf needs 0 <= x <= 1 and finite a, b > 0, got x={x_P}, a={a_P}, b={b_P}")
    mirrored_P = x_P > (a_P + 1) / (a_P + b_P + 2)
    x, a, b = np.where(mirrored_P, 1 - x_P, x_P), np.where(mirrored_P, b_P, a_P), np.where(mirrored_P, a_P, b_P)
    log_beta = np.array([math.lgamma(p) + math.lgamma(q) - math.lgamma(p + q) for p, q in zip(a, b)], dtype=np.float64)
    with np.errstate(divide="ignore"):  # x = 0: log is -inf and its exponential the right 0
        power = np.exp(a * np.log(x) + b * np.log1p(-x) - log_beta)
    value = power / (a * _continued_fraction(x, a, b))
    result: Float64Array = np.clip(np.where(mirrored_P, 1 - value, value), 0.0, 1.0)
    return result


def _continued_fraction(x: Float64Array, a: Float64Array, b: Float64Array) -> Float64Array:
    """Returns 1 + d_1 / (1 + d_2 / (1 + ...)) of DLMF 8.17.22, float64 [P]."""
    value, numerator, denominator = np.ones_like(x), np.ones_like(x), np.zeros_like(x)
    for term in range(1, _MAX_TERMS):
        m = term // 2
        if term % 2:
            d = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            d = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        denominator = 1 / _away_from_zero(1 + d * denominator)
        numerator = _away_from_zero(1 + d / numerator)
        change = numerator * denominator
        value = value * change
        if np.all(np.abs(change - 1) < 1e-15):
            break
    return value


def _away_from_zero(values: Float64Array) -> Float64Array:
    return np.where(np.abs(values) < _TINY, _TINY, values)


def exploration_draw(prompt_id: int, *, seed: int, step: int) -> float:
    """Returns a number in [0, 1) that (seed, step, prompt id) stands for: Philox (Salmon et al. 2011), a counter-based
    generator, so that nothing has to be stored or sent for ranks and resumed runs to agree."""
    key = np.array([seed % 2**64, _EXPLORATION_STREAM], dtype=np.uint64)
    bits = np.random.Philox(key=key, counter=np.array([0, prompt_id, step, 0], dtype=np.uint64))
    return float(np.random.Generator(bits).random())

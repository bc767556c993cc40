"""Difficulty of prompts: the first component of AER, which decides where the entropy bonus goes.

    accuracy (of this group, or the ledger's posterior mean) --difficulty--> d in [0, 1] --normalize--> mean <= 1

Shape suffixes: P prompts, B sequences, T packed sampled tokens.

This file does NOT hold the coefficient (controller.py) or the evidence itself (the C++ ``DifficultyLedger``).
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from aer_megatron._C import DifficultyLedger
from aer_megatron.algo.advantage import Verdicts
from aer_megatron.algo.options import LedgerSection
from aer_megatron.types import Experience, Float32Array, Float64Array, Int64Array, UInt64Array

# A mean difficulty at or below this is a batch without difficulty: dividing by it would amplify rounding.
_NO_DIFFICULTY = 1e-12


def difficulty(
    accuracy_P: Float64Array, *, shape: Literal["linear_deficit", "threshold", "complement"], rho: float
) -> Float64Array:
    """Returns d(q) in [0, 1] of every prompt, float64 [P]; 1 is hardest. g is the prompt's accuracy.

    linear_deficit: max(0, (rho - g) / rho);  threshold: 1 if g <= rho else 0;  complement: 1 - g.
    Source: "difficulty-aware coefficient allocation" of arXiv 2510.10959, whose text names rho; the three
    shapes are our reconstruction (docs/aer.md).

    Raises:
        ValueError: an accuracy is outside [0, 1] or not finite, rho outside (0, 1], or the shape is unknown.
    """
    if not np.all((accuracy_P >= 0) & (accuracy_P <= 1)):
        raise ValueError(f"accuracy_P must lie in [0, 1], got {accuracy_P}")
    if not 0 < rho <= 1:
        raise ValueError(f"rho={rho} must lie in (0, 1]; 0.5 is usual")
    if shape == "linear_deficit":
        return np.maximum(0.0, (rho - accuracy_P) / rho)
    if shape == "threshold":
        return (accuracy_P <= rho).astype(np.float64)
    if shape == "complement":
        return 1.0 - accuracy_P
    raise ValueError(f"difficulty={shape!r} is not one of linear_deficit, threshold, complement")


def normalize_difficulty(d_P: Float64Array, *, mode: Literal["none", "mean"], floor: float) -> Float64Array:
    """Returns d unchanged (``none``) or divided by the larger of its batch mean and ``floor`` (``mean``, ours), [P].

    With mean 1, difficulty only ALLOCATES the bonus and alpha alone sets its size. ``floor`` bounds a prompt's share
    by 1 / floor: without it a single hard prompt among P would carry P alpha. Below the floor, where the integrator is
    frozen, the bonus fades with the mean of d, and a batch without difficulty (all zeros) stays zeros. Give the
    controller the mean of d from before this step. float64.

    Raises:
        ValueError: the mode is unknown, or the floor is negative or not finite.
    """
    if not 0 <= floor < float("inf"):
        raise ValueError(f"floor={floor} (algo.entropy.difficulty_floor) must be a finite number >= 0; 0.02 is usual")
    if mode == "none":
        return d_P
    if mode != "mean":
        raise ValueError(f"normalize={mode!r} is not one of none, mean")
    divisor = max(float(d_P.mean()) if d_P.size else 0.0, floor)
    return d_P / divisor if divisor > _NO_DIFFICULTY else d_P


def group_token_entropy(experience: Experience, token_entropy_T: Float32Array) -> tuple[Float64Array, Int64Array]:
    """Returns (entropy_sum_P in nats, float64 [P]; token_count_P, int64 [P]) over each prompt's sampled tokens.

    A token whose entropy is not finite is in neither: the ledger lives longer than the fault that made it.

    Raises:
        ValueError: ``token_entropy_T`` is not one value per sampled token.
    """
    if token_entropy_T.shape != (experience.num_sampled_tokens,):
        raise ValueError(
            f"token_entropy_T {token_entropy_T.shape} must hold one value per sampled token, "
            f"{experience.num_sampled_tokens}"
        )
    num_prompts = int(experience.group_index_B.max()) + 1 if experience.num_sequences else 0
    group_index_T = np.repeat(experience.group_index_B, experience.sampled_length_B)
    entropy_sum_P: Float64Array = np.zeros(num_prompts, dtype=np.float64)
    token_count_P: Int64Array = np.zeros(num_prompts, dtype=np.int64)
    usable_T = np.isfinite(token_entropy_T)
    np.add.at(entropy_sum_P, group_index_T[usable_T], token_entropy_T[usable_T])
    np.add.at(token_count_P, group_index_T[usable_T], 1)
    return entropy_sum_P, token_count_P


def update_ledger(
    ledger: DifficultyLedger,
    verdicts: Verdicts,
    *,
    entropy_sum_P: Float64Array,
    token_count_P: Int64Array,
    step: int,
) -> None:
    """Returns nothing; adds the evidence of one rollout batch to ``ledger``, in place and in one call."""
    ledger.update(
        verdicts.prompt_id_P, verdicts.counts_P, verdicts.successes_P, entropy_sum_P, token_count_P, step=step
    )


def difficulty_accuracy(
    source: Literal["group", "ledger"],
    group_mean_P: Float64Array,
    ledger: DifficultyLedger,
    prompt_ids: UInt64Array,
    config: LedgerSection,
    step: int,
) -> Float64Array:
    """Returns the accuracy that difficulty is read from, float64 [P].

    ``group``: this step's accuracy, ``group_mean_P``. ``ledger`` (ours): the posterior mean of
    Beta(prior_success + decayed successes, prior_failure + decayed failures); call ``update_ledger`` first
    for it to include this step.

    Raises:
        ValueError: the source is unknown.
    """
    if source == "group":
        return group_mean_P
    if source != "ledger":
        raise ValueError(f"source={source!r} is not one of group, ledger")
    return ledger.posterior_mean(
        prompt_ids,
        prior_success=config.prior_success,
        prior_failure=config.prior_failure,
        step=step,
    )

"""Difficulty of prompts: the first component of AER, which decides where the entropy bonus goes.

    accuracy (of this group, or the ledger's posterior mean) --difficulty--> d in [0, 1] --normalize--> mean <= 1

Shape suffix: P prompts.

This file does NOT hold the coefficient (controller.py) or the evidence (ledger.py).
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from aer_megatron.types import Float64Array

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

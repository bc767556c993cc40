"""Unbiased pass@k from n samples per prompt.

Shape suffix: P prompts.
"""

from __future__ import annotations

import numpy as np

from aer_megatron.types import Float64Array, Int64Array


def pass_at_k(num_samples_P: Int64Array, num_correct_P: Int64Array, *, k: int) -> Float64Array:
    """Returns, per prompt, the unbiased estimate of P(at least one of k samples is correct), float64 [P].

    1 - C(n - c, k) / C(n, k), computed as 1 - prod_{j<k} (n - c - j) / (n - j): every factor lies in [0, 1],
    so nothing overflows and the value is monotone in k and in c. Source: Chen et al., arXiv 2107.03374,
    equation 1.

    Args:
        num_samples_P: n, samples drawn per prompt, int64 [P].
        num_correct_P: c, correct ones among them, int64 [P].

    Raises:
        ValueError: shapes differ, k < 1, k > n, or c outside 0..n.
    """
    if num_samples_P.shape != num_correct_P.shape or num_samples_P.ndim != 1:
        raise ValueError(
            f"shapes of num_samples_P {num_samples_P.shape} and num_correct_P {num_correct_P.shape} "
            f"must be equal and 1-D"
        )
    if k < 1:
        raise ValueError(f"k={k} must be at least 1")
    if np.any(num_samples_P < k):
        raise ValueError(
            f"k={k} needs at least k samples of every prompt, got {num_samples_P.min()}; draw more or lower k"
        )
    if np.any((num_correct_P < 0) | (num_correct_P > num_samples_P)):
        raise ValueError("num_correct_P must lie in 0..num_samples_P for every prompt")
    num_wrong_P = num_samples_P - num_correct_P
    all_wrong_P = np.ones(num_samples_P.shape, dtype=np.float64)
    for j in range(k):
        all_wrong_P *= np.maximum(num_wrong_P - j, 0) / (num_samples_P - j)
    return 1.0 - all_wrong_P

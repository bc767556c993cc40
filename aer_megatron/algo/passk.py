"""What n samples per prompt say of a policy: unbiased pass@k and maj@k, and how sure their means over prompts are.

Shape suffix: P prompts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

from aer_megatron.types import Float64Array, Int64Array

_COVERAGE = 0.95
_ANGLES = 1 << 14  # of the integral behind the t quantile: seven digits of it are right


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


def pass_interval(num_samples_P: Int64Array, num_correct_P: Int64Array, *, k: int) -> tuple[float, float]:
    """Returns the 95 % interval (low, high) of the mean pass@k over the prompts; arguments as ``pass_at_k``."""
    return mean_interval(pass_at_k(num_samples_P, num_correct_P, k=k), num_samples_P)


def mean_interval(value_P: Float64Array, num_samples_P: Int64Array) -> tuple[float, float]:
    """Returns the 95 % interval (low, high), within [0, 1], of the mean of ``value_P``, in [0, 1], float64 [P].

    The prompts are taken for a sample of those that could have been asked: both they and the answers to them are
    random, and the spread of the values has both in it. It is Student's interval after two prompts are added to the P,
    one below and one above the mean m, at m (1 - s) and m + (1 - m) s. s is the standard deviation over the largest one
    that such a mean allows, sqrt(m (1 - m)): where each prompt is solved always or never, s = 1 and the two are 0 and 1
    (Agresti and Coull's interval of a proportion, American Statistician 52, 1998); where prompts are alike, the two are
    close to them. Without the two, values near 0 or 1 give intervals that are too narrow. How often it covers:
    benchmarks/results/pass_interval.md.

    Args:
        num_samples_P: answers behind every value, int64 [P]: s is at least 1 / sqrt(their mean), chance alone.
    """
    num_prompts = len(value_P)
    if not num_prompts:
        return 0.0, 1.0
    mean = float(value_P.mean())
    largest = mean * (1 - mean)
    known = num_prompts > 1 and largest > 0
    spread = math.sqrt(min(1.0, max(float(value_P.var()) / largest, 1 / num_samples_P.mean()))) if known else 1.0
    values = np.concatenate([value_P, [mean * (1 - spread), mean + (1 - mean) * spread]])
    half = t_quantile(num_prompts + 1) * values.std() / math.sqrt(num_prompts + 1)
    return max(0.0, float(values.mean() - half)), min(1.0, float(values.mean() + half))


def paired_interval(difference_P: Float64Array) -> tuple[float, float]:
    """Returns Student's 95 % interval (low, high) of the mean of differences in [-1, 1] on the same prompts, [P].

    One prompt says nothing; where no two differences differ, the interval has no width.
    """
    num_prompts = len(difference_P)
    if num_prompts < 2:
        return -1.0, 1.0
    mean = float(difference_P.mean())
    half = t_quantile(num_prompts - 1) * float(difference_P.std(ddof=1)) / math.sqrt(num_prompts)
    return max(-1.0, mean - half), min(1.0, mean + half)


@functools.cache
def t_quantile(freedom: int) -> float:
    """Returns how far Student's t with ``freedom`` degrees of freedom (at least 1) is from 0 in 5 % of cases."""
    # with t = sqrt(freedom) tan(angle), the density of the angle is cos(angle) ** (freedom - 1)
    # ten standard deviations are all of it
    angles = np.linspace(0, min(math.pi / 2, 10 / math.sqrt(freedom)), _ANGLES + 1)
    density = np.cos(angles) ** (freedom - 1)
    inside = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(freedom) * math.tan(float(np.interp(_COVERAGE, inside / inside[-1], angles)))


def majority_at_k(
    num_samples_P: Int64Array, class_sizes_P: Sequence[Sequence[int]], right_P: Sequence[int | None], *, k: int
) -> Float64Array:
    """Returns, per prompt, the unbiased estimate of P(the most frequent answer of k samples is right), float64 [P].

    It is the exact mean over all sets of k of the n samples. Samples without an answer have no vote; a set without any
    vote is wrong; t answers that are equally frequent share the vote, 1 / t each. Time is of the order of k (n + number
    of classes) passes over arrays of at most k x k: about 20 ms for the worst prompt with n = k = 64.

    Args:
        num_samples_P: n, samples drawn per prompt, int64 [P].
        class_sizes_P: sizes of the classes of equivalent answers, per prompt; what is missing to n gave no answer.
        right_P: which of the prompt's classes is right, None where no sample is.

    Raises:
        ValueError: lengths differ, k outside 1..n, sizes that are below 1 or exceed n, or a class that is not there.
    """
    if not len(num_samples_P) == len(class_sizes_P) == len(right_P):
        raise ValueError(
            f"{len(num_samples_P)} prompts, {len(class_sizes_P)} of class_sizes_P and {len(right_P)} of right_P "
            "must be equally many"
        )
    cases = zip(num_samples_P.tolist(), class_sizes_P, right_P, strict=True)
    return np.array([_majority(n, sizes, right, k) for n, sizes, right in cases], dtype=np.float64)


def _majority(num_samples: int, sizes: Sequence[int], right: int | None, k: int) -> float:
    if not 1 <= k <= num_samples:
        raise ValueError(f"k={k} must lie in 1..{num_samples}, the samples of every prompt; draw more or lower k")
    if any(size < 1 for size in sizes) or sum(sizes) > num_samples:
        raise ValueError(f"class sizes {list(sizes)} must be at least 1 and at most {num_samples} together")
    if right is None:
        return 0.0
    if not 0 <= right < len(sizes):
        raise ValueError(f"right={right} must be one of {len(sizes)} classes")
    others = [size for index, size in enumerate(sizes) if index != right]
    if k == num_samples:  # one set: all of them
        most = max(others, default=0)
        return (sizes[right] > most) + (sizes[right] == most) / (1 + others.count(sizes[right]))
    # independent binomial draws of every class are, given that they are k together, draws without replacement
    share = k / num_samples
    silent_K = _binomial(num_samples - sum(sizes), share, k)
    right_K = _binomial(sizes[right], share, k)
    others_K = [_binomial(size, share, k) for size in others]
    won = 0.0
    for votes in range(1, min(sizes[right], k) + 1):
        rest = k - votes
        # ways_TK[t, d]: no other class has more votes, t have as many, all of them d together
        ways_TK = np.zeros((rest // votes + 1, rest + 1))
        ways_TK[0] = silent_K[: rest + 1]
        for other_K in others_K:
            before_TK, ways_TK = ways_TK, ways_TK * other_K[0]
            for drawn in range(1, min(votes, rest + 1)):
                ways_TK[:, drawn:] += before_TK[:, : rest + 1 - drawn] * other_K[drawn]
            if votes <= rest:
                ways_TK[1:, votes:] += before_TK[:-1, : rest + 1 - votes] * other_K[votes]
        won += right_K[votes] * float((ways_TK[:, rest] / np.arange(1, len(ways_TK) + 1)).sum())
    return float(won / _binomial(num_samples, share, k)[k])


def _binomial(count: int, share: float, most: int) -> Float64Array:
    """Returns P(d of ``count`` are drawn) for d = 0..most, float64 [most + 1]; 0 < share < 1."""
    drawn = range(min(count, most) + 1)
    logs = [
        math.lgamma(count + 1)
        - math.lgamma(d + 1)
        - math.lgamma(count - d + 1)
        + d * math.log(share)
        + (count - d) * math.log1p(-share)
        for d in drawn
    ]
    return np.concatenate([np.exp(logs), np.zeros(most - len(logs) + 1)])

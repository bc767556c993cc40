"""The policy loss (clipped surrogate with a per-token entropy bonus) and the supervised loss.

Coefficients are data: the entropy weight arrives as one number per token, the normaliser as the token count
of the GLOBAL batch. Partial losses of any split of the batch over ranks and micro-batches therefore add up to
the whole.

Shape suffix: T packed response tokens of this part of the batch (T = 0 is a legal part).

This file does NOT reduce over ranks, compute entropies or choose a coefficient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# exp(20) = 4.9e8: no useful ratio is larger, and beyond 88 fp32 gives inf, which turns 0 * ratio into NaN.
_MAX_LOG_RATIO = 20.0


@dataclass(frozen=True, slots=True)
class PolicyLossOptions:
    """Bounds of the surrogate: the ratio is clipped to [1 - clip_low, 1 + clip_high]; dual_clip 0 = off."""

    clip_low: float
    clip_high: float
    dual_clip: float


@dataclass(frozen=True, slots=True)
class LossOutput:
    """A scalar with a graph, and statistics that leave the rank as (sum, count).

    Example: ``LossOutput(loss=tensor(-0.41), sums={"ratio": (tensor(6150.2, dtype=float64), 6144.0), ...})``.
    Sums are detached float64 scalars.
    """

    loss: Tensor
    sums: dict[str, tuple[Tensor, Tensor | float]]


def policy_loss(
    logprob_T: Tensor,
    entropy_T: Tensor,
    *,
    old_logprob_T: Tensor,
    advantage_T: Tensor,
    entropy_weight_T: Tensor,
    normalizer: float,
    options: PolicyLossOptions,
) -> LossOutput:
    """Returns L = -(1/N) sum_t min(r A, clip(r) A) - (1/N) sum_t w_t H_t with r = exp(logprob - old_logprob).

    With ``dual_clip`` = c > 1 the surrogate of a negative advantage is bounded below by c A (Ye et al., arXiv
    1912.09729). Source of the rest: PPO's clipped surrogate (arXiv 1707.06347), separate bounds as in DAPO
    (arXiv 2503.14476), entropy bonus as in docs/aer.md. The log-ratio is limited to +-20 so that it cannot
    overflow.

    Args:
        logprob_T: log pi(token) under the policy being trained, fp32 [T], with graph.
        entropy_T: exact full-vocabulary entropy in nats, fp32 [T]; its gradient flows if it carries one.
        old_logprob_T: log pi(token) at the start of the step, fp32 [T], no gradient.
        advantage_T: A of the token's sequence, fp32 [T], no gradient.
        entropy_weight_T: w = coefficient * d(q), fp32 [T], no gradient.
        normalizer: N, response tokens of the global batch, not of this part.

    ``sums`` has, each over the T tokens: policy_loss, entropy_bonus (w H), token_entropy, ratio, clip_low,
    clip_high and dual_clip (tokens whose gradient that bound removes), approx_kl (r - 1 - log r >= 0, whose
    mean under tokens of the old policy is KL(old || new), "k3").

    Raises:
        ValueError: shapes differ or ``normalizer`` is not positive.
    """
    _check(normalizer, logprob_T, entropy_T, old_logprob_T, advantage_T, entropy_weight_T)
    log_ratio_T = (logprob_T - old_logprob_T).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    ratio_T = log_ratio_T.exp()
    clipped_T = ratio_T.clamp(1.0 - options.clip_low, 1.0 + options.clip_high)
    surrogate_T = torch.minimum(ratio_T * advantage_T, clipped_T * advantage_T)
    if options.dual_clip > 0:
        bounded_T = torch.maximum(surrogate_T, options.dual_clip * advantage_T)
        surrogate_T = torch.where(advantage_T < 0, bounded_T, surrogate_T)
    bonus_T = entropy_weight_T * entropy_T
    loss = -(surrogate_T + bonus_T).sum() / normalizer

    ratio, negative = ratio_T.detach(), advantage_T < 0
    dual = negative & (ratio > options.dual_clip) if options.dual_clip > 0 else torch.zeros_like(negative)
    log_ratio = log_ratio_T.detach().double()
    return LossOutput(
        loss,
        {
            "policy_loss": _sum(-surrogate_T),
            "entropy_bonus": _sum(bonus_T),
            "token_entropy": _sum(entropy_T),
            "ratio": _sum(ratio),
            "clip_low": _sum(negative & (ratio < 1.0 - options.clip_low)),
            "clip_high": _sum((advantage_T > 0) & (ratio > 1.0 + options.clip_high)),
            "dual_clip": _sum(dual),
            "approx_kl": _sum(torch.expm1(log_ratio) - log_ratio),
        },
    )


def supervised_loss(logprob_T: Tensor, *, normalizer: float) -> LossOutput:
    """Returns -(1/N) sum_t logprob_t; ``sums`` has supervised_loss (-logprob).

    Args:
        logprob_T: log pi(token) of the response tokens, fp32 [T], with graph.
        normalizer: N, response tokens of the global batch, not of this part.

    Raises:
        ValueError: ``normalizer`` is not positive or ``logprob_T`` is not 1-D.
    """
    _check(normalizer, logprob_T)
    return LossOutput(-logprob_T.sum() / normalizer, {"supervised_loss": _sum(-logprob_T)})


def _sum(value_T: Tensor) -> tuple[Tensor, float]:
    return value_T.detach().double().sum(), float(value_T.shape[0])


def _check(normalizer: float, *tensors_T: Tensor) -> None:
    shapes = [tuple(tensor.shape) for tensor in tensors_T]
    if len(shapes[0]) != 1 or any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"the loss takes packed tokens of one shape [T], got {shapes}")
    if not normalizer > 0:
        raise ValueError(f"normalizer={normalizer} must be the positive token count of the global batch")

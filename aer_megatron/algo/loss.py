"""The policy loss (a surrogate per token, an entropy bonus, a KL to a reference policy) and the supervised loss.

Coefficients are data: the entropy weight and the weight in the mean arrive as one number per token, which tokens a
covariance rule picked as a mask, the normaliser as the token count of the GLOBAL batch. Partial losses of any split of
the batch over ranks and micro-batches therefore add up to the whole.

Shape suffixes: T packed sampled tokens of this part of the batch (T = 0 is a legal part), b sequences of the
mini-batch.

This file does NOT reduce over ranks, compute entropies, select tokens or choose a coefficient.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from aer_megatron.algo.options import AlgoSection
from aer_megatron.types import Float64Array, Int64Array

# exp(20) = 4.9e8: no useful ratio is larger, and beyond 88 fp32 gives inf, which turns 0 * ratio into NaN.
_MAX_LOG_RATIO = 20.0
# Two fp32 log-probabilities of one policy differ by less than this; the sign of such a difference is noise.
_ROUNDING = 1e-5


@dataclass(frozen=True, slots=True)
class TokenData:
    """What the loss knows of each token beside the scores: data without a graph, fp32 [T] where not said otherwise."""

    old_logprob_T: Tensor  # log pi(token) at the start of the step, by the trainer
    rollout_logprob_T: Tensor  # log pi(token) as the rollout engine reported it
    advantage_T: Tensor  # A of the token's sequence
    entropy_weight_T: Tensor  # coefficient * d(q)
    mean_weight_T: Tensor  # weight in the mean over tokens, see sequence_weights; 1 for the token mean
    selected_T: Tensor | None  # bool [T]: picked by the covariance rule; None where the rule is "clip"
    ref_logprob_T: Tensor | None  # log pi(token) under the reference policy; None where kl_coefficient is 0


@dataclass(frozen=True, slots=True)
class LossOutput:
    """A scalar with a graph, and statistics that leave the rank as (sum, count).

    Example: ``LossOutput(loss=tensor(-0.41), sums={"ratio": (tensor(6150.2, dtype=float64), 6144.0), ...})``.
    Sums are detached float64 scalars.
    """

    loss: Tensor
    sums: dict[str, tuple[Tensor, Tensor | float]]


def policy_loss(
    logprob_T: Tensor, entropy_T: Tensor, *, tokens: TokenData, normalizer: float, config: AlgoSection
) -> LossOutput:
    """Returns L = (1/N) sum_t w_t (p_t - e_t H_t + k kl_t), r = exp(logprob - old_logprob).

    p_t by ``config.policy_loss``:

    - ``clip``: -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), PPO's surrogate (arXiv 1707.06347) with separate
      bounds (DAPO, arXiv 2503.14476). ``dual_clip`` = c > 1 bounds it below by c A where A < 0 (arXiv 1912.09729).
    - ``clip_cov``: the same, 0 for the selected tokens (arXiv 2505.22617).
    - ``kl_cov``: -r A, plus kl_cov_coefficient |logprob - old_logprob| for the selected tokens (arXiv 2505.22617).
      Where the two differ by rounding alone the term has no gradient: its sign would be noise.

    ``tis_clip`` = c > 0 multiplies p_t by min(exp(old_logprob - rollout_logprob), c), truncated importance sampling of
    the difference between rollout engine and trainer. kl_t is k3 = exp(x) - x - 1 with x = ref_logprob - logprob
    (Schulman, "Approximating KL divergence"; GRPO, arXiv 2402.03300), its gradient through logprob. e_t H_t is the
    bonus of docs/aer.md. Log-ratios are limited to +-20 so that they cannot overflow.

    Args:
        logprob_T: log pi(token) under the policy being trained, fp32 [T], with graph.
        entropy_T: exact full-vocabulary entropy in nats, fp32 [T]; its gradient flows if it carries one.
        tokens: everything that is data.
        normalizer: N, sampled tokens of the global batch, not of this part.

    ``sums``, each over the T tokens: policy_loss (w p), entropy_bonus (w e H), token_entropy, ratio, clip_low,
    clip_high and dual_clip (tokens whose gradient that bound removes), approx_kl (r - 1 - log r >= 0, whose mean under
    tokens of the old policy is KL(old || new)); where they are in force: reference_kl (w kl), selected (tokens), and
    tis_weight, tis_weight_squared, tis_cut (tokens above the bound).

    Raises:
        ValueError: shapes differ, ``normalizer`` is not positive, or data of a rule in force is missing.
    """
    _check(normalizer, logprob_T, entropy_T, *_present(tokens, config))
    log_ratio_T = (logprob_T - tokens.old_logprob_T).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    policy_T = _policy_terms(log_ratio_T, tokens, config)
    sums = _ratio_statistics(log_ratio_T, tokens, config)
    weight_T = tokens.mean_weight_T
    if config.tis_clip:
        importance_T, correction = _importance(tokens, config.tis_clip)
        policy_T = importance_T * policy_T
        sums |= correction
    bonus_T = tokens.entropy_weight_T * entropy_T
    total_T = policy_T - bonus_T
    sums["policy_loss"] = _sum(weight_T * policy_T)
    sums["entropy_bonus"] = _sum(weight_T * bonus_T)
    sums["token_entropy"] = _sum(entropy_T)
    if config.kl_coefficient and tokens.ref_logprob_T is not None:
        gap_T = (tokens.ref_logprob_T - logprob_T).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
        kl_T = torch.expm1(gap_T) - gap_T
        total_T = total_T + config.kl_coefficient * kl_T
        sums["reference_kl"] = _sum(weight_T * kl_T)
    return LossOutput((weight_T * total_T).sum() / normalizer, sums)


def supervised_loss(logprob_T: Tensor, *, normalizer: float) -> LossOutput:
    """Returns -(1/N) sum_t logprob_t; ``sums`` has supervised_loss (-logprob).

    Args:
        logprob_T: log pi(token) of the tokens that carry loss, fp32 [T], with graph.
        normalizer: N, sampled tokens of the global batch, not of this part.

    Raises:
        ValueError: ``normalizer`` is not positive or ``logprob_T`` is not 1-D.
    """
    _check(normalizer, logprob_T)
    return LossOutput(-logprob_T.sum() / normalizer, {"supervised_loss": _sum(-logprob_T)})


def sequence_weights(sampled_length_b: Int64Array, *, rule: str, max_new_tokens: int) -> Float64Array:
    """Returns w float64 [b] that turns the token mean (1/N) sum_i w_i sum_t l_it into the mean of ``rule``.

    N is the mini-batch's count of sampled tokens. ``tokens``: that mean itself, w = 1. ``sequences``: the mean over
    sequences of their token means, w_i = N / (b length_i). ``constant``: the sum over b * max_new_tokens, which no
    response's length enters (Dr.GRPO, arXiv 2503.20783), w = N / (b max_new_tokens).
    """
    length_b = sampled_length_b.astype(np.float64)
    if rule == "tokens":
        return np.ones_like(length_b)
    divisor_b = length_b if rule == "sequences" else np.full_like(length_b, max_new_tokens)
    weight_b: Float64Array = length_b.sum() / (len(length_b) * divisor_b)
    return weight_b


def _policy_terms(log_ratio_T: Tensor, tokens: TokenData, config: AlgoSection) -> Tensor:
    ratio_T, advantage_T = log_ratio_T.exp(), tokens.advantage_T
    if config.policy_loss == "kl_cov":
        assert tokens.selected_T is not None
        moved_T = torch.where(log_ratio_T.abs() < _ROUNDING, log_ratio_T.detach(), log_ratio_T)
        penalty_T = config.kl_cov_coefficient * moved_T.abs()
        return torch.where(tokens.selected_T, penalty_T, 0.0) - ratio_T * advantage_T
    clipped_T = ratio_T.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
    surrogate_T = torch.minimum(ratio_T * advantage_T, clipped_T * advantage_T)
    if config.dual_clip > 0:
        bounded_T = torch.maximum(surrogate_T, config.dual_clip * advantage_T)
        surrogate_T = torch.where(advantage_T < 0, bounded_T, surrogate_T)
    if config.policy_loss == "clip_cov":
        assert tokens.selected_T is not None
        surrogate_T = torch.where(tokens.selected_T, 0.0, surrogate_T)
    return -surrogate_T


def _ratio_statistics(
    log_ratio_T: Tensor, tokens: TokenData, config: AlgoSection
) -> dict[str, tuple[Tensor, Tensor | float]]:
    log_ratio, advantage_T = log_ratio_T.detach(), tokens.advantage_T
    ratio, negative = log_ratio.exp(), advantage_T < 0
    none = torch.zeros_like(negative)
    clips = config.policy_loss != "kl_cov"
    sums: dict[str, tuple[Tensor, Tensor | float]] = {
        "ratio": _sum(ratio),
        "clip_low": _sum(negative & (ratio < 1.0 - config.clip_low) if clips else none),
        "clip_high": _sum((advantage_T > 0) & (ratio > 1.0 + config.clip_high) if clips else none),
        "dual_clip": _sum(negative & (ratio > config.dual_clip) if config.dual_clip > 0 else none),
        "approx_kl": _sum(torch.expm1(log_ratio.double()) - log_ratio.double()),
    }
    if tokens.selected_T is not None:
        sums["selected"] = _sum(tokens.selected_T)
    return sums


def _importance(tokens: TokenData, bound: float) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor | float]]]:
    gap_T = (tokens.old_logprob_T - tokens.rollout_logprob_T).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    ratio_T = gap_T.detach().exp()
    weight_T = ratio_T.clamp(max=bound)
    return weight_T, {
        "tis_weight": _sum(weight_T),
        "tis_weight_squared": _sum(weight_T.double().square()),
        "tis_cut": _sum(ratio_T > bound),
    }


def _present(tokens: TokenData, config: AlgoSection) -> list[Tensor]:
    """Returns the tensors of ``tokens``. Raises ValueError where a rule in force has no data."""
    if (tokens.selected_T is None) != (config.policy_loss == "clip"):
        raise ValueError(f"algo.policy_loss={config.policy_loss!r}: selected_T belongs to clip_cov and kl_cov alone")
    if config.kl_coefficient and tokens.ref_logprob_T is None:
        raise ValueError(
            f"algo.kl_coefficient={config.kl_coefficient} needs log-probabilities of the reference policy: "
            "score it first, or set 0"
        )
    optional = [tensor for tensor in (tokens.selected_T, tokens.ref_logprob_T) if tensor is not None]
    return [
        tokens.old_logprob_T,
        tokens.rollout_logprob_T,
        tokens.advantage_T,
        tokens.entropy_weight_T,
        tokens.mean_weight_T,
        *optional,
    ]


def _sum(value_T: Tensor) -> tuple[Tensor, float]:
    return value_T.detach().double().sum(), float(value_T.shape[0])


def _check(normalizer: float, *tensors_T: Tensor) -> None:
    shapes = [tuple(tensor.shape) for tensor in tensors_T]
    if len(shapes[0]) != 1 or any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"the loss takes packed tokens of one shape [T], got {shapes}")
    if not normalizer > 0:
        raise ValueError(f"normalizer={normalizer} must be the positive token count of the global batch")

"""The policy loss (a rule's loss per token, an entropy bonus, a KL to a reference policy) and the supervised loss.

Coefficients are data: the entropy weight and the weight in the mean arrive as one number per token, which tokens the
rule picked as a mask, the normaliser as the token count of the GLOBAL batch. Partial losses of any split of the batch
over ranks and micro-batches therefore add up to the whole.

Shape suffixes: T packed sampled tokens of this part of the batch (T = 0 is a legal part), b sequences of the
mini-batch.

This file does NOT reduce over ranks, compute entropies, select tokens or choose a coefficient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from aer_megatron.algo.options import AlgoSection, CorrectionSection
from aer_megatron.algo.policy_losses.base import PolicyLoss, PolicyTokens
from aer_megatron.algo.statistics import CLIP_STATISTICS, TokenSums, token_sum
from aer_megatron.types import Float64Array, Int64Array

# exp(20) = 4.9e8: no useful ratio is larger, and beyond 88 fp32 gives inf, which turns 0 * ratio into NaN.
_MAX_LOG_RATIO = 20.0


@dataclass(frozen=True, slots=True)
class TokenData:
    """What the loss knows of each token beside the scores: data without a graph, fp32 [T] where not said otherwise."""

    old_logprob_T: Tensor  # log pi(token) at the start of the step, by the trainer
    advantage_T: Tensor  # A of the token's sequence
    entropy_weight_T: Tensor  # coefficient * d(q)
    mean_weight_T: Tensor  # weight in the mean over tokens, see sequence_weights; 1 for the token mean
    selected_T: Tensor | None  # bool [T]: picked by the policy loss; None where it selects nothing
    ref_logprob_T: Tensor | None  # log pi(token) under the reference policy; None where kl_coefficient is 0
    # mean of logprob - old_logprob over the token's whole sequence; None unless the policy loss is ``of_sequences``
    sequence_log_ratio_T: Tensor | None = None
    importance_T: Tensor | None = None  # multiplies the policy's term (algo/correction.py); None: nothing is corrected


@dataclass(frozen=True, slots=True)
class LossOutput:
    """A scalar with a graph, and statistics that leave the rank as (sum, count).

    Example: ``LossOutput(loss=tensor(-0.41), sums={"ratio": (tensor(6150.2, dtype=float64), 6144.0), ...})``.
    Sums are detached float64 scalars.
    """

    loss: Tensor
    sums: TokenSums


def policy_loss(
    logprob_T: Tensor, entropy_T: Tensor, *, tokens: TokenData, normalizer: float, config: AlgoSection
) -> LossOutput:
    """Returns L = (1/N) sum_t w_t (p_t - e_t H_t + k kl_t), r = exp(logprob - old_logprob).

    p_t is the loss of ``config.policy_loss``, times ``tokens.importance_T`` where rollouts are corrected. kl_t is the
    estimate of ``config.kl_estimator`` times its ratio, with the gradient through logprob. e_t H_t is the bonus of
    docs/aer.md. Log-ratios are limited to +-20 so that they cannot overflow.

    Args:
        logprob_T: log pi(token) under the policy being trained, fp32 [T], with graph.
        entropy_T: exact full-vocabulary entropy in nats, fp32 [T]; its gradient flows if it carries one.
        tokens: everything that is data.
        normalizer: N, the global batch's sampled tokens that the loss is a mean over, not those of this part.

    ``sums``, each over the T tokens: policy_loss (w p), entropy_bonus (w e H), token_entropy, ratio, clip_low,
    clip_high and dual_clip (tokens whose gradient that bound removes), approx_kl (r - 1 - log r >= 0, whose mean under
    tokens of the old policy is KL(old || new)); where they are in force: reference_kl (w kl), selected (tokens), and
    importance_weight, importance_weight_squared, importance_cut (tokens at a bound), importance_rejected (of weight 0).
    Then what the rule reports of its own.

    Raises:
        ValueError: shapes differ, ``normalizer`` is not positive, data of a rule in force is missing, or the rule
            returns another shape or reports what it did not declare.
    """
    _check(normalizer, logprob_T, entropy_T, *_present(tokens, config))
    log_ratio_T = _limited(logprob_T - tokens.old_logprob_T)
    # the policy's term, corrected for what the rollout engine computed in another way
    policy_T, sums = _policy_terms(logprob_T, log_ratio_T, tokens, config.policy_loss)
    weight_T = tokens.mean_weight_T
    if tokens.importance_T is not None:
        policy_T = tokens.importance_T * policy_T
        sums |= _importance_sums(tokens.importance_T, config.correction)
    # the entropy bonus
    bonus_T = tokens.entropy_weight_T * entropy_T
    total_T = policy_T - bonus_T
    sums["policy_loss"] = token_sum(weight_T * policy_T)
    sums["entropy_bonus"] = token_sum(weight_T * bonus_T)
    sums["token_entropy"] = token_sum(entropy_T)
    # the distance from the reference policy
    if config.kl_coefficient and tokens.ref_logprob_T is not None:
        estimator = config.kl_estimator
        kl_T = estimator.estimate(_limited(tokens.ref_logprob_T - logprob_T))
        if estimator.ratio != "none":
            ratio_T = log_ratio_T.exp()
            kl_T = kl_T * (ratio_T if estimator.ratio == "live" else ratio_T.detach())
        total_T = total_T + config.kl_coefficient * kl_T
        sums["reference_kl"] = token_sum(weight_T * kl_T)
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
    return LossOutput(-logprob_T.sum() / normalizer, {"supervised_loss": token_sum(-logprob_T)})


def sequence_weights(sampled_length_b: Int64Array, *, rule: str, max_new_tokens: int) -> Float64Array:
    """Returns w float64 [b] that turns the token mean (1/N) sum_i w_i sum_t l_it into the mean of ``rule``.

    N is the mini-batch's count of sampled tokens. ``tokens``: that mean itself, w = 1. ``sequences``: the mean over
    sequences of their token means, w_i = N / (b length_i). ``constant``: the sum over b * max_new_tokens, which no
    response's length enters (Dr.GRPO, arXiv 2503.20783), w = N / (b max_new_tokens). b
    counts sequences without a sampled token, too.
    """
    length_b = sampled_length_b.astype(np.float64)
    if rule == "tokens":
        return np.ones_like(length_b)
    divisor_b = np.maximum(length_b, 1.0) if rule == "sequences" else np.full_like(length_b, max_new_tokens)
    weight_b: Float64Array = length_b.sum() / (len(length_b) * divisor_b)
    return weight_b


def sequence_log_ratios(
    logprob_T: Tensor,
    old_logprob_T: Tensor,
    *,
    sequence_T: Tensor,
    length_B: Tensor,
    add: Callable[[Tensor], Tensor] = lambda sum_B: sum_B,
) -> Tensor:
    """Returns the mean log ratio over the sampled tokens of each token's sequence, fp32 [T], without a graph.

    Args:
        logprob_T, old_logprob_T: as in ``policy_loss``.
        sequence_T: index 0..B-1 of the token's sequence, int64 [T].
        length_B: sampled tokens of each whole sequence.
        add: adds a tensor [B] over the ranks that hold parts of the same sequences.
    """
    sum_B = torch.zeros(len(length_B), dtype=torch.float64, device=logprob_T.device)
    log_ratio_T = _limited(logprob_T.detach() - old_logprob_T)
    mean_B = add(sum_B.index_add(0, sequence_T, log_ratio_T.double())) / length_B.clamp(min=1)
    return mean_B[sequence_T].to(logprob_T.dtype)


def _limited(log_ratio_T: Tensor) -> Tensor:
    return log_ratio_T.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)


def _policy_terms(
    logprob_T: Tensor, log_ratio_T: Tensor, tokens: TokenData, rule: PolicyLoss
) -> tuple[Tensor, TokenSums]:
    """Returns (the rule's loss per token, its statistics and those that every rule has)."""
    policy_T, reported = rule.token_loss(
        PolicyTokens(logprob_T, log_ratio_T, tokens.advantage_T, tokens.selected_T, tokens.sequence_log_ratio_T)
    )
    if policy_T.shape != log_ratio_T.shape or not reported.keys() <= {*CLIP_STATISTICS, *rule.reports}:
        raise ValueError(
            f"algo.policy_loss.kind={rule.kind!r} must return one loss per token, {tuple(log_ratio_T.shape)}, and "
            f"report among {[*CLIP_STATISTICS, *rule.reports]}; it returned {tuple(policy_T.shape)}, {sorted(reported)}"
        )
    log_ratio = log_ratio_T.detach()
    sums: TokenSums = {
        "ratio": token_sum(log_ratio.exp()),
        "approx_kl": token_sum(torch.expm1(log_ratio.double()) - log_ratio.double()),
    }
    none = (log_ratio.new_zeros((), dtype=torch.float64), float(len(log_ratio)))
    if tokens.selected_T is not None:
        sums["selected"] = token_sum(tokens.selected_T)
    return policy_T, sums | dict.fromkeys(CLIP_STATISTICS, none) | reported


def _importance_sums(weight_T: Tensor, options: CorrectionSection) -> TokenSums:
    cut_T = torch.zeros_like(weight_T, dtype=torch.bool)
    if options.bound == "truncate":
        for bound in (options.low, options.high):
            cut_T |= (weight_T == bound) & (bound > 0)
    return {
        "importance_weight": token_sum(weight_T),
        "importance_weight_squared": token_sum(weight_T.double().square()),
        "importance_cut": token_sum(cut_T),
        "importance_rejected": token_sum(weight_T == 0),
    }


def _present(tokens: TokenData, config: AlgoSection) -> list[Tensor]:
    """Returns the tensors of ``tokens``. Raises ValueError where a rule in force has no data."""
    rule = config.policy_loss
    if (tokens.selected_T is not None) != rule.selects:
        raise ValueError(f"algo.policy_loss.kind={rule.kind!r}: selected_T belongs to rules that select alone")
    if rule.of_sequences and tokens.sequence_log_ratio_T is None:
        raise ValueError(f"algo.policy_loss.kind={rule.kind!r} needs the ratio of whole sequences")
    if config.kl_coefficient and tokens.ref_logprob_T is None:
        raise ValueError(
            f"algo.kl_coefficient={config.kl_coefficient} needs log-probabilities of the reference policy: "
            "score it first, or set 0"
        )
    optional = [
        tensor
        for tensor in (tokens.selected_T, tokens.ref_logprob_T, tokens.sequence_log_ratio_T, tokens.importance_T)
        if tensor is not None
    ]
    return [
        tokens.old_logprob_T,
        tokens.advantage_T,
        tokens.entropy_weight_T,
        tokens.mean_weight_T,
        *optional,
    ]


def _check(normalizer: float, *tensors_T: Tensor) -> None:
    shapes = [tuple(tensor.shape) for tensor in tensors_T]
    if len(shapes[0]) != 1 or any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"the loss takes packed tokens of one shape [T], got {shapes}")
    if not normalizer > 0:
        raise ValueError(f"normalizer={normalizer} must be the positive token count of the global batch")

"""Log-probability and entropy of a token distribution on one whole (unsharded) vocabulary, in float64.

This is the oracle of every sharded, in-place or fused form in `parallel/`, written for clarity: it allocates
freely, uses no autograd and takes another route (log_softmax, then sums over p log p) than the forms it
checks.

Shape suffixes: T tokens, V vocabulary (padding included), K histogram bins.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LogprobEntropy(NamedTuple):
    """Per-token statistics of p = softmax(x), x = logits / temperature, over the vocabulary; entropies are in nats.

    `logprob_T` and `entropy_T` carry gradients where the logits do. The others never do, and are None unless they
    were asked for: the largest probability, sum p^2 (the collision probability), and the geometry of the two gradients,
    |d logprob / dx|^2 = 1 - 2 p_y + sum p^2, |d entropy / dx|^2 = sum p^2 (log p + H)^2 and their dot product
    sum p^2 (log p + H) - p_y (log p_y + H).
    """

    logprob_T: Tensor
    entropy_T: Tensor
    top1_prob_T: Tensor | None = None
    sum_sq_prob_T: Tensor | None = None
    logprob_grad_sq_T: Tensor | None = None
    entropy_grad_sq_T: Tensor | None = None
    grad_dot_T: Tensor | None = None


def _log_probabilities(logits_TV: Tensor, temperature: float, vocab_size: int) -> Tensor:
    real_TV = logits_TV[:, :vocab_size].detach().double()
    # The row's maximum goes first: large logits would lose digits in the division.
    return torch.log_softmax((real_TV - real_TV.amax(dim=-1, keepdim=True)) / temperature, dim=-1)


def logprob_entropy(logits_TV: Tensor, labels_T: Tensor, *, temperature: float, vocab_size: int) -> LogprobEntropy:
    """Return all statistics in float64, without gradient.

    Args:
        logits_TV: [T, V], any floating dtype. Columns from `vocab_size` on are padding and take no part.
        labels_T: [T] int64 in [0, vocab_size).
        temperature: the logits are divided by it.
        vocab_size: number of real columns, at most V.
    """
    logp_TV = _log_probabilities(logits_TV, temperature, vocab_size)
    prob_TV = logp_TV.exp()
    p_logp_TV = torch.where(prob_TV > 0, prob_TV * logp_TV, 0.0)  # lim p log p = 0 as p -> 0
    entropy_T = -p_logp_TV.sum(dim=-1)
    by_logprob_TV = -prob_TV
    by_logprob_TV.scatter_add_(1, labels_T[:, None], torch.ones_like(prob_TV[:, :1]))
    by_entropy_TV = -(p_logp_TV + prob_TV * entropy_T[:, None])
    return LogprobEntropy(
        logprob_T=logp_TV.gather(1, labels_T[:, None]).squeeze(1),
        entropy_T=entropy_T,
        top1_prob_T=prob_TV.amax(dim=-1),
        sum_sq_prob_T=prob_TV.square().sum(dim=-1),
        logprob_grad_sq_T=by_logprob_TV.square().sum(dim=-1),
        entropy_grad_sq_T=by_entropy_TV.square().sum(dim=-1),
        grad_dot_T=(by_logprob_TV * by_entropy_TV).sum(dim=-1),
    )


def logprob_entropy_gradient(
    logits_TV: Tensor,
    labels_T: Tensor,
    grad_logprob_T: Tensor,
    grad_entropy_T: Tensor,
    *,
    temperature: float,
    vocab_size: int,
) -> Tensor:
    """Return d(sum grad_logprob * logprob + grad_entropy * entropy) / d logits, [T, V] float64.

    With p = softmax(logits / temperature), dL/dlogits = (g_logp (1[y] - p) - g_H p (log p + H)) /
    temperature, where terms with p = 0 are 0 and padding columns get 0. See `logprob_entropy` for the
    arguments.
    """
    logp_TV = _log_probabilities(logits_TV, temperature, vocab_size)
    prob_TV = logp_TV.exp()
    p_logp_TV = torch.where(prob_TV > 0, prob_TV * logp_TV, 0.0)
    entropy_T1 = -p_logp_TV.sum(dim=-1, keepdim=True)
    one_hot_TV = torch.zeros_like(prob_TV).scatter_(1, labels_T[:, None], 1.0)
    grad_TV = grad_logprob_T.double()[:, None] * (one_hot_TV - prob_TV)
    grad_TV -= grad_entropy_T.double()[:, None] * (p_logp_TV + prob_TV * entropy_T1)
    padding = logits_TV.shape[1] - vocab_size
    return torch.nn.functional.pad(grad_TV / temperature, (0, padding))

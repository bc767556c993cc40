"""From logits and one uniform number per sequence to token ids: inverse-CDF sampling.

Shape suffixes: B sequences, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aer_megatron.rollout.engine import SamplingOptions

# Rows are sampled in slices of about this many probabilities: the fp64 CDF of a large batch and a large
# vocabulary would otherwise be the engine's largest tensor. Results do not depend on it.
_SLICE_ELEMENTS = 1 << 22
_NOT_FINITE = "the model's logits are not finite: the policy has diverged or its weights are damaged"


def sample_tokens(logits_BV: Tensor, uniform_B: Tensor, options: SamplingOptions) -> tuple[Tensor, Tensor]:
    """Returns the sampled token ids (int64 [B]) and their log-probabilities (fp32 [B], nats).

    Sequence b gets the first token, in the order of token ids, whose cumulative probability in the truncated
    distribution exceeds ``uniform_B[b]`` times its total: a token of probability zero is never drawn, and a
    small rounding difference of the logits changes the token only where the uniform number is that close to a
    boundary.

    Args:
        logits_BV: any floating dtype [B, V].
        uniform_B: fp64 [B] in [0, 1), same device.
        options: temperature (0: the most probable token) and truncation; the log-probability is taken before it.

    Raises:
        RuntimeError: a row of logits is not finite.
    """
    num_rows = max(1, _SLICE_ELEMENTS // logits_BV.shape[1])
    parts = [
        _sample_slice(logits, uniform, options)
        for logits, uniform in zip(torch.split(logits_BV, num_rows), torch.split(uniform_B, num_rows), strict=True)
    ]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([tokens for tokens, _ in parts]), torch.cat([logprobs for _, logprobs in parts])


def truncate(prob_BV: Tensor, *, top_p: float, top_k: int) -> Tensor:
    """Returns ``prob_BV`` with the tokens outside top-k and top-p set to zero, not renormalised [B, V].

    A token is kept if it is among the ``top_k`` most probable ones (0 = all; ties go to the lower id) and the
    tokens more probable than it hold less than ``top_p``; so at least one token is always kept.
    """
    sorted_BV, index_BV = prob_BV.sort(dim=-1, descending=True, stable=True)
    keep_BV = sorted_BV.cumsum(dim=-1, dtype=torch.float64) - sorted_BV < top_p
    keep_BV[:, 0] = True
    if top_k:
        keep_BV[:, top_k:] = False
    return torch.zeros_like(prob_BV).scatter_(-1, index_BV, sorted_BV * keep_BV)


def _sample_slice(logits_BV: Tensor, uniform_B: Tensor, options: SamplingOptions) -> tuple[Tensor, Tensor]:
    if options.temperature == 0:
        return _most_probable(logits_BV.float())
    logprob_BV = torch.log_softmax(logits_BV.float() / options.temperature, dim=-1)
    prob_BV = logprob_BV.exp()
    if options.top_p < 1 or 0 < options.top_k < prob_BV.shape[1]:
        prob_BV = truncate(prob_BV, top_p=options.top_p, top_k=options.top_k)
    cdf_BV = prob_BV.cumsum(dim=-1, dtype=torch.float64)
    total_B1 = cdf_BV[:, -1:].contiguous()
    if not bool(torch.isfinite(total_B1).all()):
        raise RuntimeError(_NOT_FINITE)
    # Rounding may lift uniform * total up to the total itself, beyond the last token.
    target_B1 = torch.minimum(uniform_B.unsqueeze(1) * total_B1, torch.nextafter(total_B1, torch.zeros_like(total_B1)))
    token_B1 = torch.searchsorted(cdf_BV, target_B1, right=True)
    return token_B1.squeeze(1), logprob_BV.gather(1, token_B1).squeeze(1)


def _most_probable(logits_BV: Tensor) -> tuple[Tensor, Tensor]:
    token_B1 = logits_BV.argmax(dim=-1, keepdim=True)  # of equal ones the first
    logprob_BV = torch.log_softmax(logits_BV, dim=-1)
    if not bool(torch.isfinite(logprob_BV.amax(dim=-1)).all()):
        raise RuntimeError(_NOT_FINITE)
    return token_B1.squeeze(1), logprob_BV.gather(1, token_B1).squeeze(1)

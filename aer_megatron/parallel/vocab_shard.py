"""Arithmetic of log-probability and entropy on one shard of the vocabulary, chunk by chunk.

With x = logits / temperature and the label y, every rank reduces its columns to four numbers per token,
    m = max x    S = sum exp(x - m)    W = sum exp(x - m) (x - m)    t = x[y] where this rank owns y, else 0
one all-gather shares them, and every rank combines all ranks' numbers in rank order, hence bitwise alike:
    M = max m_r    S = sum S_r exp(m_r - M)    W = sum exp(m_r - M) (W_r + (m_r - M) S_r)
    logp = t - M - log S        H = log S - W / S
The backward pass needs no collective and is pointwise, so it may be written over the logits themselves:
    dx = g_logp (1[y] - p) - g_H p (log p + H),   p = exp(x - M) / S,   log p + H = (x - M) - W / S
M and S are kept apart because M + log S would round away log S when the logits are large. Exponents are in
units of log 2 ("bits"): exp2 is several times faster than exp on a CPU and native on a GPU.

Shape suffixes: T tokens, W columns of this rank's vocabulary shard, C tokens of one chunk, R tensor-parallel
ranks, K statistics per token.

The passes over the columns are in vocab_eager.py and vocab_triton.py. This file knows neither autograd nor where the
logits come from: see vocab.py and fused_head.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from aer_megatron.algo.entropy import LogprobEntropy
from aer_megatron.costs.memory import DEVICE_CHUNK_BYTES, chunk_rows
from aer_megatron.parallel.collectives import all_gather_flat

_LN_2 = math.log(2.0)
# exp2 of anything below is 0, even as a float64 subnormal. Exponents are raised to it, so that -inf logits
# give 0 * finite = 0 instead of 0 * inf = NaN; no other result changes.
MIN_BITS = -1100.0

# Rows of a statistics block [K, T]; the last three, sum e^2, sum e^2 s and sum e^2 s^2, are there only with statistics.
MAX, SUM_EXP, SUM_EXP_SHIFT, LABEL_LOGIT, SUM_EXP_SQ, SUM_EXP_SQ_SHIFT, SUM_EXP_SQ_SHIFT_SQ = range(7)


@dataclass(frozen=True, slots=True)
class VocabShard:
    """Where this rank's columns lie in the vocabulary, and what is asked of them.

    Example: rank 1 of 2, 64 columns each, 100 real tokens: ``VocabShard(start=64, width=36, vocab_size=100,
        ...)``.
    """

    start: int
    width: int  # real columns here; the columns from `vocab_size` on are padding
    vocab_size: int
    temperature: float
    tp_group: dist.ProcessGroup | None
    with_statistics: bool

    @property
    def bits_per_logit(self) -> float:
        """Returns the factor from a difference of logits to an exponent of two; it carries the
        temperature."""
        return 1.0 / (_LN_2 * self.temperature)


class TokenState(NamedTuple):
    """What the backward pass needs per token: the largest logit anywhere, S, and W / S in bits."""

    max_T: Tensor
    sum_exp_T: Tensor
    mean_shift_T: Tensor


class TokenGradient(NamedTuple):
    """Per-token factors of the pointwise backward: dx = exp2(shift) (constant + slope shift) + label 1[y]."""

    max_T: Tensor
    constant_T: Tensor
    slope_T: Tensor | None
    label_T: Tensor | None

    def rows(self, rows: slice) -> TokenGradient:
        return TokenGradient(*(None if vector is None else vector[rows] for vector in self))  # type: ignore[arg-type]


def describe_shard(
    columns: int,
    *,
    tp_group: dist.ProcessGroup | None,
    vocab_size: int | None,
    temperature: float,
    with_statistics: bool,
) -> VocabShard:
    """Returns this rank's place in the vocabulary of `columns` columns per rank.

    Raises:
        ValueError: an impossible `vocab_size` or `temperature`.
    """
    padded_size = columns * _tp_world_size(tp_group)
    size = padded_size if vocab_size is None else vocab_size
    if not 0 < size <= padded_size:
        raise ValueError(
            f"vocab_size={vocab_size} must lie in [1, {padded_size}], the padded vocabulary of all shards; "
            "pass the tokenizer's vocabulary size, or None if no column is padding"
        )
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature={temperature} must be positive and finite; 1.0 changes nothing")
    start = 0 if tp_group is None else columns * dist.get_rank(tp_group)
    width = min(max(size - start, 0), columns)
    return VocabShard(start, width, size, temperature, tp_group, with_statistics)


def _tp_world_size(tp_group: dist.ProcessGroup | None) -> int:
    """Returns the number of shards; None means that the tensor is whole, never the world."""
    return 1 if tp_group is None else dist.get_world_size(tp_group)


def check_labels(labels_T: Tensor, tokens: int, vocab_size: int) -> None:
    """Raises ValueError unless `labels_T` holds one token id in [0, vocab_size) per row."""
    if labels_T.shape != (tokens,) or labels_T.dtype != torch.int64:
        raise ValueError(
            f"labels_T has shape {tuple(labels_T.shape)} and dtype {labels_T.dtype}; "
            f"it must be torch.int64 of shape ({tokens},): one label per row"
        )
    if tokens == 0:
        return
    low, high = torch.stack(torch.aminmax(labels_T)).tolist()  # one device synchronisation, not two
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"labels_T has values in [{low}, {high}], outside [0, vocab_size={vocab_size}); "
            "select the rows with loss mask 1 instead of marking the others with an ignore index"
        )


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of reductions over logits of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows_per_chunk(like: Tensor, columns: int, chunk_tokens: int | None, cpu_bytes: int) -> int:
    """Returns `chunk_tokens`, by default the smaller of a byte budget and 1/16 of the rows of `like`, at
    least 1."""
    tokens = like.shape[0]
    if chunk_tokens is None:
        budget = cpu_bytes if like.device.type == "cpu" else DEVICE_CHUNK_BYTES
        return chunk_rows(columns, tokens, budget, compute_dtype(like.dtype).itemsize)
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens} must be at least 1; None chooses it")
    return min(chunk_tokens, max(1, tokens))


def chunks(tokens: int, rows: int) -> Iterator[slice]:
    """Yields consecutive slices of `rows` rows."""
    for first in range(0, tokens, rows):
        yield slice(first, min(first + rows, tokens))


def empty_statistics(tokens: int, shard: VocabShard, like: Tensor) -> Tensor:
    """Returns the statistics [K, T] of a shard without columns."""
    dtype = compute_dtype(like.dtype)
    stats_KT = torch.zeros(7 if shard.with_statistics else 4, tokens, dtype=dtype, device=like.device)
    stats_KT[MAX] = torch.finfo(like.dtype).min
    return stats_KT


def gather_statistics(stats_KT: Tensor, shard: VocabShard) -> Tensor:
    """Returns all ranks' statistics [R, K, T] by the only collective of a call."""
    ranks = _tp_world_size(shard.tp_group)
    if ranks == 1 or stats_KT.numel() == 0:
        return stats_KT[None].expand(ranks, -1, -1)
    flat = stats_KT.new_empty(ranks * stats_KT.shape[0], stats_KT.shape[1])
    all_gather_flat(flat, stats_KT, group=shard.tp_group)
    return flat.view(ranks, *stats_KT.shape)


def combine_statistics(stats_RKT: Tensor, shard: VocabShard) -> tuple[LogprobEntropy, TokenState]:
    """Returns the results over the whole vocabulary; ranks are added in order, hence bitwise alike
    everywhere."""
    max_T = stats_RKT[:, MAX].amax(dim=0)
    sum_exp_T, sum_shift_T, label_T = (torch.zeros_like(max_T) for _ in range(3))
    squares_KT = torch.zeros_like(stats_RKT[0, SUM_EXP_SQ:])
    for stats_KT in stats_RKT:
        shift_T = ((stats_KT[MAX] - max_T) * shard.bits_per_logit).clamp_(min=MIN_BITS)
        scale_T = torch.exp2(shift_T)
        sum_exp_T += scale_T * stats_KT[SUM_EXP]
        sum_shift_T += scale_T * (stats_KT[SUM_EXP_SHIFT] + shift_T * stats_KT[SUM_EXP])
        label_T += stats_KT[LABEL_LOGIT]
        if shard.with_statistics:
            sq_T, sq_shift_T, sq_shift_sq_T = stats_KT[SUM_EXP_SQ:]
            moved_sq_T = sq_shift_sq_T + shift_T * (2 * sq_shift_T + shift_T * sq_T)
            squares_KT += scale_T.square() * torch.stack((sq_T, sq_shift_T + shift_T * sq_T, moved_sq_T))
    log_sum_T, mean_shift_T = sum_exp_T.log(), sum_shift_T / sum_exp_T
    result = LogprobEntropy(
        logprob_T=(label_T - max_T) / shard.temperature - log_sum_T,
        entropy_T=log_sum_T - _LN_2 * mean_shift_T,
    )
    state = TokenState(max_T, sum_exp_T, mean_shift_T)
    return (_with_statistics(result, state, squares_KT) if shard.with_statistics else result), state


def _with_statistics(result: LogprobEntropy, state: TokenState, squares_KT: Tensor) -> LogprobEntropy:
    """Returns ``result`` with the statistics that follow from sum e^2, sum e^2 s and sum e^2 s^2 (s in bits).

    log p + H = log 2 (s - W / S) needs no logarithm of a small p, and the sums need no second pass.
    """
    sq_T, sq_shift_T, sq_shift_sq_T = squares_KT / state.sum_exp_T.square()
    mean_T = state.mean_shift_T
    slope_T = _LN_2 * (sq_shift_T - mean_T * sq_T)  # sum p^2 (log p + H)
    label_T = result.logprob_T.exp()
    return result._replace(
        top1_prob_T=1.0 / state.sum_exp_T,
        sum_sq_prob_T=sq_T,
        # rounding may leave a square a little below 0
        logprob_grad_sq_T=(1.0 - 2.0 * label_T + sq_T).clamp_(min=0.0),
        entropy_grad_sq_T=(_LN_2**2 * (sq_shift_sq_T - mean_T * (2 * sq_shift_T - mean_T * sq_T))).clamp_(min=0.0),
        grad_dot_T=slope_T - torch.where(label_T > 0, label_T * (result.logprob_T + result.entropy_T), 0.0),
    )


def sum_over_shards(tensor: Tensor, shard: VocabShard) -> None:
    """Adds up `tensor` over the ranks that share the vocabulary, in place."""
    if shard.tp_group is not None and _tp_world_size(shard.tp_group) > 1 and tensor.numel() > 0:
        dist.all_reduce(tensor, group=shard.tp_group)


def token_gradient(
    state: TokenState, grad_logprob_T: Tensor | None, grad_entropy_T: Tensor | None, temperature: float
) -> TokenGradient:
    """Returns the factors of the backward pass; a gradient that is None contributes nothing."""
    # exp2(shift) / S is p, and d x / d logits is 1 / temperature.
    scale_T = 1.0 / (state.sum_exp_T * temperature)
    constant_T = torch.zeros_like(scale_T)
    slope_T = label_T = None
    if grad_logprob_T is not None:
        constant_T = -grad_logprob_T * scale_T
        label_T = grad_logprob_T / temperature
    if grad_entropy_T is not None:
        slope_T = -_LN_2 * grad_entropy_T * scale_T
        constant_T = constant_T - slope_T * state.mean_shift_T
    return TokenGradient(state.max_T, constant_T, slope_T, label_T)

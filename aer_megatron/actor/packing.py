"""Shares packed sequences out to data-parallel ranks, micro-batches and context-parallel ranks.

    sequences --FLOPs--> data-parallel ranks --tokens--> micro-batches --zig-zag--> context-parallel ranks

The first step decides how long the slowest rank takes, the second how much memory a micro-batch needs. Both are the C++
partition: the better of longest-first and Karmarkar-Karp. Every rank derives the whole plan, so nobody has to be told.

Shape suffixes: B sequences, b those of one step's mini-batch, n those of one micro-batch, T packed tokens of all
context-parallel ranks, t of this one, R context-parallel ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from aer_megatron._C import balanced_partition
from aer_megatron.costs.model_size import ModelSizes, active_matrix_parameters, query_width
from aer_megatron.types import Int64Array

_COST_UNITS = 64  # costs are integers: this many per token


@dataclass(frozen=True, slots=True)
class TokenCut:
    """How the tokens of a micro-batch are cut inside a data-parallel replica.

    ``shards`` is what a rank's tokens must be a multiple of: the tensor-parallel size under sequence parallelism, times
    what FP8 products ask for. Example: cp = 2 and 4 shards: sequences are padded to multiples of 4, micro-batches of 8.
    """

    cp_rank: int = 0
    cp_size: int = 1
    shards: int = 1

    @property
    def sequence_multiple(self) -> int:
        """What every sequence's padded length must be a multiple of."""
        return 2 * self.cp_size if self.cp_size > 1 else 1

    @property
    def total_multiple(self) -> int:
        """What the padded tokens of a micro-batch must be a multiple of."""
        return math.lcm(self.sequence_multiple, self.cp_size * self.shards)


def context_positions(length_n: Int64Array, *, cp_rank: int, cp_size: int) -> Int64Array:
    """Returns the packed positions [t] that a context-parallel rank holds, sequence by sequence; t = T / R.

    A sequence falls into 2 R chunks; rank r holds chunk r and chunk 2 R - 1 - r, in this order, so that the causal
    work is even ("zig-zag"). Example: lengths [4, 8], rank 0 of 2: ``[0 3 4 5 10 11]``.

    Raises:
        ValueError: a length that 2 * cp_size does not divide, where cp_size > 1.
    """
    if cp_size == 1:
        return np.arange(int(length_n.sum()), dtype=np.int64)
    if np.any(length_n % (2 * cp_size)):
        raise ValueError(f"lengths {length_n.tolist()} must be multiples of 2 * cp = {2 * cp_size}: pad them first")
    parts = []
    start = 0
    for length in length_n.tolist():
        chunk = length // (2 * cp_size)
        for index in (cp_rank, 2 * cp_size - 1 - cp_rank):
            parts.append(np.arange(start + index * chunk, start + (index + 1) * chunk, dtype=np.int64))
        start += length
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def sequence_costs(length_B: Int64Array, model: ModelSizes) -> Int64Array:
    """Returns int64 [B], a sequence's forward FLOPs through the layers in units of 2 N / 64 (1/64 of a short token).

    FLOPs = 2 N L + 2 A L^2 with N matrix elements that a token meets and A = layers x query columns: scores and
    context take 2 L^2 x columns each, of which causal attention needs half.
    """
    quadratic = model.num_layers * query_width(model) / active_matrix_parameters(model)
    length = length_B.astype(np.float64)
    return np.rint(_COST_UNITS * (length + quadratic * length**2)).astype(np.int64)


def padded_lengths(length_n: Int64Array, cut: TokenCut) -> Int64Array:
    """Returns what each sequence of one packed micro-batch is padded to; the last one also fills up the total.

    A micro-batch without sequences has one of padding alone: it takes part in the schedule and weighs nothing.
    """
    if not length_n.size:
        return np.array([cut.total_multiple], dtype=np.int64)
    padded = -(-length_n // cut.sequence_multiple) * cut.sequence_multiple
    padded[-1] += -int(padded.sum()) % cut.total_multiple
    return padded


def pack_micro_batches(
    indices_b: Int64Array,
    length_B: Int64Array,
    cost_B: Int64Array,
    *,
    ranks: tuple[int, int],
    budget: int,
    multiple: int,
    cut: TokenCut,
) -> list[Int64Array]:
    """Returns the sequences of this rank's packed micro-batches: the same number on every rank of ``ranks``.

    Args:
        length_B, cost_B: tokens and FLOPs of all sequences, of which ``indices_b`` are dealt out.
        ranks: this data-parallel rank and their number.
        budget: padded tokens of one micro-batch over all context-parallel ranks. A longer sequence has a micro-batch
            to itself, which raises the budget of the step to its length.
        multiple: the number of micro-batches is a multiple of this (what an interleaved pipeline asks for).

    The costliest micro-batch comes first, so that ranks that wait for one another after each wait little; inside,
    sequences are sorted by length. A rank with too few sequences has empty ones at the end.
    """
    rank, num_ranks = ranks
    # ranks get about equal FLOPs
    of_rank = _split(indices_b, cost_B[indices_b], num_ranks)
    # a total is padded by less than total_multiple: leave room for that
    width_B = -(-length_B // cut.sequence_multiple) * cut.sequence_multiple
    slack = cut.total_multiple - cut.sequence_multiple
    limit = max(budget - slack, int(width_B[indices_b].max(initial=1)))
    # the fewest micro-batches that hold every rank's tokens, then more until the fullest one fits
    least = max(-(-int(width_B[part].sum()) // limit) for part in of_rank)
    number = max(1, -(-least // multiple)) * multiple
    while any(_heaviest(width_B[part], number) > limit for part in of_rank):
        number += multiple
    # inside of the rank, micro-batches get about equal tokens
    parts = sorted(_split(of_rank[rank], width_B[of_rank[rank]], number), key=lambda part: -int(cost_B[part].sum()))
    return [part[np.argsort(length_B[part], kind="stable")] for part in parts]


def _heaviest(weight_n: Int64Array, num_parts: int) -> int:
    if not weight_n.size:
        return 0
    groups = balanced_partition(weight_n, min(num_parts, len(weight_n)), equal_size=False)
    return int(np.bincount(groups, weights=weight_n).max())


def _split(indices: Int64Array, weight: Int64Array, num_parts: int) -> Sequence[Int64Array]:
    """Returns ``num_parts`` parts of ``indices`` of about equal weight; the last ones are empty where few remain."""
    if not indices.size:
        return [indices] * num_parts
    used = min(num_parts, len(indices))
    groups = balanced_partition(np.ascontiguousarray(weight), used, equal_size=False)
    return [indices[groups == part] for part in range(used)] + [indices[:0]] * (num_parts - used)

"""Cuts a packed batch of sequences into mini-batches, data-parallel shares and padded micro-batches.

Shape suffixes: B sequences, b sequences of one micro-batch, S padded sequence length, T packed response tokens,
t response tokens of one micro-batch, L packed prompt + response tokens.

The logits at position s predict token s + 1, so the rows that carry loss are positions prompt_length - 1 up to
prompt_length + response_length - 2. Padding is on the right and never seen by a real token (causal attention); it is
found by length, never by a pad id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from aer_megatron.types import Int64Array


class PackedSequences(Protocol):
    """What Experience and SupervisedBatch share."""

    @property
    def prompt_length_B(self) -> Int64Array: ...
    @property
    def response_length_B(self) -> Int64Array: ...
    @property
    def token_ids_L(self) -> Int64Array: ...


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """A padded rectangle of sequences and the flat places of its response tokens.

    Example, prompt [5 6], response [7 1], padded to S = 6: ``tokens_bS=[[5 6 7 1 0 0]]``, ``row_t=[1 2]`` (flat b * S
    positions whose logits are scored), ``label_t=[7 1]``, ``packed_t`` (their indices in the batch's T order).
    """

    tokens_bS: Int64Array
    row_t: Int64Array
    label_t: Int64Array
    packed_t: Int64Array
    sequence_t: Int64Array  # index 0..B-1 of the sequence that each response token belongs to

    @property
    def sequence_length(self) -> int:
        return int(self.tokens_bS.shape[1])


def minibatch_indices(num_sequences: int, num_minibatches: int, seed: int) -> list[Int64Array]:
    """Returns equal random parts of 0..num_sequences-1; with one part the order is left as it is.

    The permutation depends on ``seed`` alone, so every rank cuts the same way.
    """
    if num_sequences % num_minibatches:
        raise ValueError(f"num_minibatches={num_minibatches} must divide the {num_sequences} sequences of the batch")
    order = np.arange(num_sequences, dtype=np.int64)
    if num_minibatches > 1:
        order = np.random.Generator(np.random.Philox(seed)).permutation(order)
    return [np.ascontiguousarray(part) for part in order.reshape(num_minibatches, -1)]


def micro_batch_indices(
    indices_b: Int64Array, lengths_B: Int64Array, *, dp_rank: int, dp_size: int, micro_batch_size: int
) -> list[Int64Array]:
    """Returns this data-parallel rank's micro-batches: the same number on every rank.

    Sequences are sorted by total length (stable) so that a micro-batch holds similar lengths, and dealt to the ranks
    one by one so that every rank gets the same mix. ``indices_b`` that do not fill ``dp_size`` equal parts are an
    error: the caller pads the list with sequences of weight zero or picks another batch size.
    """
    if len(indices_b) % dp_size:
        raise ValueError(f"{len(indices_b)} sequences cannot be dealt equally to {dp_size} data-parallel ranks")
    order = indices_b[np.argsort(lengths_B[indices_b], kind="stable")]
    mine = order[dp_rank::dp_size]
    return [mine[start : start + micro_batch_size] for start in range(0, len(mine), micro_batch_size)]


def pad_micro_batch(sequences: PackedSequences, indices_b: Int64Array, *, pad_multiple: int) -> MicroBatch:
    """Returns the padded micro-batch of ``indices_b``, in that order; S is a multiple of ``pad_multiple``."""
    prompt_B, response_B = sequences.prompt_length_B, sequences.response_length_B
    start_L = offsets(prompt_B + response_B)
    start_T = offsets(response_B)
    lengths = (prompt_B + response_B)[indices_b]
    longest = int(lengths.max())
    width = -(-longest // pad_multiple) * pad_multiple
    tokens_bS = np.zeros((len(indices_b), width), dtype=np.int64)
    rows, packed = [], []
    for row, index in enumerate(indices_b.tolist()):
        length, prompt, response = int(lengths[row]), int(prompt_B[index]), int(response_B[index])
        tokens_bS[row, :length] = sequences.token_ids_L[start_L[index] : start_L[index] + length]
        first = row * width + prompt - 1
        rows.append(np.arange(first, first + response, dtype=np.int64))
        packed.append(np.arange(start_T[index], start_T[index] + response, dtype=np.int64))
    row_t = _concatenate(rows)
    return MicroBatch(
        tokens_bS=tokens_bS,
        row_t=row_t,
        label_t=tokens_bS.reshape(-1)[row_t + 1],
        packed_t=_concatenate(packed),
        sequence_t=np.repeat(indices_b, response_B[indices_b]),
    )


def offsets(length_B: NDArray[np.int64]) -> Int64Array:
    """Returns where each sequence starts in the packed array: the exclusive cumulative sum, int64[B]."""
    start = np.zeros(len(length_B), dtype=np.int64)
    np.cumsum(length_B[:-1], out=start[1:])
    return start


def _concatenate(parts: Sequence[Int64Array]) -> Int64Array:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

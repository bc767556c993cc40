"""Cuts a packed batch of sequences into mini-batches, data-parallel shares and micro-batches.

A micro-batch is a padded rectangle, or a row of packed sequences that do not see one another; actor/packing.py decides
which sequences are packed together. Under context parallelism a rank builds its own share of the tokens.

Shape suffixes: B sequences, b rows of one micro-batch, n its sequences, S tokens of a row on this rank, T packed
sampled tokens, t sampled tokens of one micro-batch on this rank, L packed prompt + response tokens.

The logits at position s predict token s + 1, so the rows that carry loss are those before a sampled token: of a
single-turn answer positions prompt_length - 1 up to prompt_length + response_length - 2. Padding is on the right and
never seen by a real token (causal attention); it is found by length, never by a pad id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from aer_megatron.actor.packing import TokenCut, context_positions, padded_lengths
from aer_megatron.types import Int64Array, PackedSequences


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """This rank's tokens of a micro-batch and the flat places of the sampled tokens among them.

    Example, prompt [5 6], response [7 1], padded to S = 6: ``tokens_bS=[[5 6 7 1 0 0]]``, ``row_t=[1 2]`` (flat b * S
    positions whose logits are scored), ``label_t=[7 1]``, ``packed_t`` (their indices in the batch's T order).
    Packed sequences are one row, b = 1, and ``packed_length_n`` has their padded lengths.
    """

    tokens_bS: Int64Array
    row_t: Int64Array
    label_t: Int64Array
    packed_t: Int64Array
    sequence_t: Int64Array  # index 0..B-1 of the sequence that each sampled token belongs to
    packed_length_n: Int64Array | None = None  # over all context-parallel ranks; None: a rectangle
    is_whole: bool = True  # False: some of its sampled tokens alone, looked at by one rank

    @property
    def sequence_length(self) -> int:
        return int(self.tokens_bS.shape[1])

    def some_tokens(self, mask_t: NDArray[np.bool_]) -> MicroBatch:
        """Returns the micro-batch with those of its sampled tokens alone."""
        return replace(
            self,
            row_t=self.row_t[mask_t],
            label_t=self.label_t[mask_t],
            packed_t=self.packed_t[mask_t],
            sequence_t=self.sequence_t[mask_t],
            is_whole=False,
        )


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


def padded_micro_batches(
    sequences: PackedSequences, parts: Sequence[Int64Array], cut: TokenCut, *, same_shape: bool
) -> list[MicroBatch]:
    """Returns a rectangle for each of ``parts``, one row per sequence in that order; an empty part is padding alone.

    With ``same_shape`` all have the rows and the width of the largest.
    """
    length_B = sequences.length_B
    longest = [int(length_B[part].max(initial=1)) for part in parts]
    width = [-(-length // cut.total_multiple) * cut.total_multiple for length in longest]
    rows = [max(1, len(part)) for part in parts]
    if same_shape:
        width, rows = [max(width)] * len(parts), [max(rows)] * len(parts)
    sampled_B = sequences.sampled_length_B
    return [
        _micro_batch(sequences, sampled_B, part, np.full(rows[i], width[i], dtype=np.int64), cut, packed=False)
        for i, part in enumerate(parts)
    ]


def packed_micro_batches(
    sequences: PackedSequences, parts: Sequence[Int64Array], cut: TokenCut, *, same_shape: bool
) -> list[MicroBatch]:
    """Returns a row of packed sequences for each of ``parts``, in that order; an empty part is padding alone.

    With ``same_shape`` the last sequence of each is padded until all rows are as long as the longest.
    """
    length_B = sequences.length_B
    width = [padded_lengths(length_B[part], cut) for part in parts]
    if same_shape:
        total = max(int(width_n.sum()) for width_n in width)
        for width_n in width:
            width_n[-1] += total - int(width_n.sum())
    sampled_B = sequences.sampled_length_B
    return [_micro_batch(sequences, sampled_B, part, width[i], cut, packed=True) for i, part in enumerate(parts)]


def _micro_batch(
    sequences: PackedSequences,
    sampled_B: Int64Array,
    indices_n: Int64Array,
    width_n: Int64Array,
    cut: TokenCut,
    *,
    packed: bool,
) -> MicroBatch:
    """Lays the sequences side by side, ``width_n`` tokens each, and takes this context-parallel rank's share.

    Sharing the prompt of a group's rollouts would happen here: its tokens laid down once, the responses after it.
    """
    length_B = sequences.length_B
    # the whole micro-batch: tokens at their places, rows whose scores are wanted, places in the global batch
    start_L, start_T, start_n = offsets(length_B), offsets(sampled_B), offsets(width_n)
    tokens = np.zeros(int(width_n.sum()), dtype=np.int64)
    rows, in_batch = [], []
    for place, index in enumerate(indices_n.tolist()):
        length, first, source = int(length_B[index]), int(start_n[place]), int(start_L[index])
        tokens[first : first + length] = sequences.token_ids_L[source : source + length]
        rows.append(first - 1 + sampled_positions(sequences, index, source))
        in_batch.append(np.arange(start_T[index], start_T[index] + sampled_B[index], dtype=np.int64))
    row, packed_t, sequence_t = _concatenate(rows), _concatenate(in_batch), np.repeat(indices_n, sampled_B[indices_n])
    label_t = tokens[row + 1]
    # this rank's share of it
    mine = context_positions(width_n, cp_rank=cut.cp_rank, cp_size=cut.cp_size)
    if cut.cp_size > 1:
        local = np.full(len(tokens), -1, dtype=np.int64)
        local[mine] = np.arange(len(mine))
        here = local[row] >= 0
        row, label_t, packed_t, sequence_t = local[row[here]], label_t[here], packed_t[here], sequence_t[here]
    return MicroBatch(
        tokens_bS=tokens[mine].reshape(1 if packed else len(width_n), -1),
        row_t=row,
        label_t=label_t,
        packed_t=packed_t,
        sequence_t=sequence_t,
        packed_length_n=width_n if packed else None,
    )


def sampled_positions(sequences: PackedSequences, sequence: int, start: int) -> Int64Array:
    """Returns the positions of the sampled tokens in their sequence, which begins at ``start`` of L, int64 [t]."""
    prompt, response = int(sequences.prompt_length_B[sequence]), int(sequences.response_length_B[sequence])
    if sequences.sampled_L is None:
        return np.arange(prompt, prompt + response, dtype=np.int64)
    return np.flatnonzero(sequences.sampled_L[start : start + prompt + response])


def offsets(length_B: NDArray[np.int64]) -> Int64Array:
    """Returns where each sequence starts in the packed array: the exclusive cumulative sum, int64[B]."""
    start = np.zeros(len(length_B), dtype=np.int64)
    np.cumsum(length_B[:-1], out=start[1:])
    return start


def _concatenate(parts: Sequence[Int64Array]) -> Int64Array:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

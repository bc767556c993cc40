"""Turns sequences into this rank's micro-batches and runs them through Megatron-Core's forward-backward schedules.

    Experience --cut--> MicroBatch --Megatron schedule--> scores [K, t] --finish--> loss and sums, or collected rows

Padded and packed micro-batches differ here and in actor/batching.py, nowhere else. This file does NOT know losses,
optimizers or what becomes of the scores.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from aer_megatron.actor.batching import (
    MicroBatch,
    micro_batch_indices,
    packed_micro_batches,
    padded_micro_batches,
)
from aer_megatron.actor.layers import token_multiple
from aer_megatron.actor.packing import TokenCut, pack_micro_batches, sequence_costs
from aer_megatron.convert.architecture import ModelArchitecture
from aer_megatron.options.training import ParallelSection
from aer_megatron.parallel.topology import Topology
from aer_megatron.types import Int64Array, PackedSequences

# (scores, micro-batch) -> Megatron's (loss, number of tokens, anything that the caller collects)
Finish = Callable[[Tensor, MicroBatch], tuple[Tensor, Tensor, Any]]


class MicroBatchRunner:
    """Runs the chunks of one rank; every rank of a replica runs the same number of micro-batches."""

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        *,
        arch: ModelArchitecture,
        options: ParallelSection,
        topology: Topology,
        device: torch.device,
    ) -> None:
        self._chunks = list(chunks)
        self._arch = arch
        self._options = options
        self._topology = topology
        self._device = device
        shards = (topology.tp if options.sequence_parallel else 1) * token_multiple(chunks[0].config)
        self._cut = TokenCut(topology.cp_rank, topology.cp, shards=shards)

    def cut(self, sequences: PackedSequences, indices_b: Int64Array) -> list[MicroBatch]:
        """Returns this rank's micro-batches of ``indices_b``, packed where ``tokens_per_micro_batch`` is set.

        An interleaved pipeline takes multiples of pp micro-batches, what is missing is filled with empty ones, all of
        one shape: its stages do not tell one another what comes next.
        """
        topology, budget = self._topology, self._options.tokens_per_micro_batch
        interleaved = topology.vpp > 1
        multiple = topology.pp if interleaved else 1
        length_B = sequences.length_B
        if budget:
            parts = pack_micro_batches(
                indices_b,
                length_B,
                sequence_costs(length_B, self._arch),
                ranks=(topology.dp_rank, topology.dp),
                budget=budget,
                multiple=multiple,
                cut=self._cut,
            )
            return packed_micro_batches(sequences, parts, self._cut, same_shape=interleaved)
        parts = micro_batch_indices(
            indices_b,
            length_B,
            dp_rank=topology.dp_rank,
            dp_size=topology.dp,
            micro_batch_size=self._options.micro_batch_size,
        )
        parts += [indices_b[:0]] * (-len(parts) % multiple)
        return padded_micro_batches(sequences, parts, self._cut, same_shape=interleaved)

    def forward_backward(self, micros: list[MicroBatch], finish: Finish) -> list[Any]:
        """Returns what ``finish`` gave to collect, on last stages; gradients are in the buffers, added over ranks."""
        result: list[Any] = self._run(micros, lambda output, *, micro: finish(output, micro), forward_only=False)
        return result

    def forward_only(self, micros: list[MicroBatch], collect: Callable[[Tensor, MicroBatch], None]) -> None:
        """Gives ``collect`` the scores of every micro-batch (on last pipeline stages only)."""

        def finish(output_Kt: Tensor, *, micro: MicroBatch, non_loss_data: bool) -> None:
            del non_loss_data
            collect(output_Kt, micro)

        self._run(micros, finish, forward_only=True)

    def _run(self, micros: list[MicroBatch], finish: Callable[..., Any], *, forward_only: bool) -> Any:
        for chunk in self._chunks:
            chunk.train(not forward_only)
        return get_forward_backward_func()(
            forward_step_func=functools.partial(self._forward_step, finish=finish),
            data_iterator=[iter(micros) for _ in self._chunks],
            model=self._chunks,
            num_microbatches=len(micros),
            seq_length=micros[0].sequence_length * self._topology.cp,
            micro_batch_size=len(micros[0].tokens_bS),
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    def _forward_step(
        self, data_iterator: Iterator[MicroBatch], model: torch.nn.Module, *, finish: Callable[..., Any]
    ) -> tuple[Tensor, Callable[..., Any]]:
        micro = next(data_iterator)
        output = model(
            self._on_device(micro.tokens_bS),
            None,  # rotary positions follow from the shape, or from the packed lengths
            None,  # causal attention alone: padding is on the right
            labels=self._on_device(micro.label_t),
            loss_mask=self._on_device(micro.row_t),
            packed_seq_params=self._packed(micro.packed_length_n),
        )
        return output, functools.partial(finish, micro=micro)

    def _packed(self, length_n: Int64Array | None) -> PackedSeqParams | None:
        """Returns Megatron's description of packed sequences, or None for a rectangle.

        A sequence's own padding counts as part of it: it comes last, so nothing sees it, and kernels that know no gaps
        between sequences can be used.
        """
        if length_n is None:
            return None
        ends = self._on_device(np.concatenate([[0], length_n.cumsum()])).to(torch.int32)
        longest = int(length_n.max())
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends,
            cu_seqlens_q_padded=ends,
            cu_seqlens_kv_padded=ends,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )

    def _on_device(self, array: Int64Array) -> Tensor:
        return torch.from_numpy(array).to(self._device)

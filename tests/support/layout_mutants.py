"""Mistakes of parallel training, each planted into the running program; the layout matrix must fail on every one.

Each is a context manager around scoring and one update; the layout in which it shows stands beside it in MUTANTS.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from tests.support.layout_matrix import Layout, Variant


def _of_finalize(name: str, replacement: Any) -> Any:
    # the package has a function of the module's name, which hides the module from a dotted path
    return mock.patch.object(sys.modules["megatron.core.distributed.finalize_model_grads"], name, replacement)


def _nothing(*args: Any, **kwargs: Any) -> None:
    del args, kwargs


@contextlib.contextmanager
def no_gradient_reduction() -> Iterator[None]:
    """Every replica updates from its own tokens alone."""
    with mock.patch("megatron.core.distributed.DistributedDataParallel.finish_grad_sync", _nothing):
        yield


@contextlib.contextmanager
def doubled_gradient_reduction() -> Iterator[None]:
    """Gradients that are added over the replicas already are added again."""
    from megatron.core.distributed import DistributedDataParallel

    once = DistributedDataParallel.finish_grad_sync

    def twice(self: Any, *args: Any, **kwargs: Any) -> None:
        once(self, *args, **kwargs)
        for buffer in self.buffers:
            dist.all_reduce(buffer.grad_data, group=self.dp_cp_group)

    with mock.patch.object(DistributedDataParallel, "finish_grad_sync", twice):
        yield


@contextlib.contextmanager
def mean_of_means() -> Iterator[None]:
    """Every micro-batch is divided by its own number of tokens and by the number of micro-batches."""
    from aer_megatron.algo.loss import policy_loss

    def own_mean(logprob_T: Tensor, entropy_T: Tensor, **options: Any) -> Any:
        return policy_loss(logprob_T, entropy_T, **{**options, "normalizer": 6.0 * max(1, len(logprob_T))})

    with mock.patch("aer_megatron.actor.actor.policy_loss", own_mean):
        yield


@contextlib.contextmanager
def _speakers(rule: Callable[[Any], bool]) -> Iterator[None]:
    from aer_megatron.parallel.topology import Topology

    with mock.patch.object(Topology, "writes_results", property(rule)):
        yield


def every_tensor_rank_speaks() -> AbstractContextManager[None]:
    """Statistics are counted once per tensor-parallel rank."""
    return _speakers(lambda topology: bool(topology.is_last_stage))


def one_context_rank_speaks() -> AbstractContextManager[None]:
    """Statistics of the other context-parallel ranks' tokens are lost."""
    return _speakers(lambda topology: topology.is_last_stage and topology.tp_rank == 0 and topology.cp_rank == 0)


@contextlib.contextmanager
def context_ranks_add_first() -> Iterator[None]:
    """Context-parallel ranks add their statistics among themselves, and then everybody adds everybody's."""
    from megatron.core import parallel_state

    from aer_megatron.parallel.exchange import all_sum

    def twice(values: Any, **options: Any) -> Any:
        added = torch.from_numpy(values.copy())
        dist.all_reduce(added, group=parallel_state.get_context_parallel_group())
        return all_sum(added.numpy(), **options)

    with mock.patch("aer_megatron.actor.updates.all_sum", twice):
        yield


@contextlib.contextmanager
def norms_of_one_shard() -> Iterator[None]:
    """Norm weights see the gradient of one tensor-parallel rank's part of the sequence."""
    with _of_finalize("_allreduce_non_tensor_model_parallel_grads", _nothing):
        yield


@contextlib.contextmanager
def embedding_of_one_stage() -> Iterator[None]:
    """The tied embedding's gradients of the first and the last stage are not added."""
    with _of_finalize("_allreduce_word_embedding_grads", _nothing):
        yield


@contextlib.contextmanager
def keys_keep_their_gradient() -> Iterator[None]:
    """The gradients that other context-parallel ranks have for this one's keys and values stay there."""
    from aer_megatron.parallel import context

    def own_part(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0][dist.get_rank(ctx.cp_group)].contiguous(), None

    with mock.patch.object(context._GatherContext, "backward", staticmethod(own_part)):
        yield


@contextlib.contextmanager
def packed_sequences_meet() -> Iterator[None]:
    """Attention takes a row of packed sequences for one sequence."""
    from aer_megatron.actor.attention import ExactAttention

    def one_run(self: Any, packed: Any) -> Iterator[tuple[slice, int]]:
        total = int(packed.cu_seqlens_q[-1])
        yield slice(0, total), total

    with mock.patch.object(ExactAttention, "_runs", one_run):
        yield


@contextlib.contextmanager
def contiguous_context() -> Iterator[None]:
    """Sequences are cut into contiguous parts where attention expects two chunks each."""

    def contiguous(length_n: Any, *, cp_rank: int, cp_size: int) -> Any:
        starts = np.cumsum(length_n) - length_n
        parts = [
            np.arange(start + cp_rank * length // cp_size, start + (cp_rank + 1) * length // cp_size)
            for start, length in zip(starts.tolist(), length_n.tolist(), strict=True)
        ]
        return np.concatenate(parts)

    with mock.patch("aer_megatron.actor.batching.context_positions", contiguous):
        yield


@contextlib.contextmanager
def first_tokens_are_sampled() -> Iterator[None]:
    """As many tokens as were sampled are scored, from the beginning of the response."""

    def first(sequences: Any, sequence: int, start: int) -> Any:
        return int(sequences.prompt_length_B[sequence]) + np.arange(sequences.sampled_length_B[sequence])

    with mock.patch("aer_megatron.actor.batching.sampled_positions", first):
        yield


@contextlib.contextmanager
def responses_are_the_normalizer() -> Iterator[None]:
    """The loss is divided by the response tokens, a tool's among them."""
    from aer_megatron.algo.loss import policy_loss
    from tests.support.policies import fixed_batch

    tokens = float(fixed_batch().experience.response_length_B.sum())

    def of_responses(logprob_T: Tensor, entropy_T: Tensor, **options: Any) -> Any:
        return policy_loss(logprob_T, entropy_T, **{**options, "normalizer": tokens})

    with mock.patch("aer_megatron.actor.actor.policy_loss", of_responses):
        yield


PACKED, THREE = Variant(packed=True), Variant(micro_batches=3)
MUTANTS: dict[str, tuple[Callable[[], AbstractContextManager[None]], Layout, Variant]] = {
    "no gradient reduction, dp": (no_gradient_reduction, Layout(), THREE),
    "no gradient reduction, cp": (no_gradient_reduction, Layout(cp=2), PACKED),
    "doubled gradient reduction, dp": (doubled_gradient_reduction, Layout(), Variant()),
    "doubled gradient reduction, cp": (doubled_gradient_reduction, Layout(cp=2), PACKED),
    "mean of means": (mean_of_means, Layout(), THREE),
    "every tensor rank speaks": (every_tensor_rank_speaks, Layout(tp=2), Variant()),
    "one context rank speaks": (one_context_rank_speaks, Layout(cp=2), Variant()),
    "context ranks add first": (context_ranks_add_first, Layout(cp=2), Variant()),
    "norms of one shard": (norms_of_one_shard, Layout(tp=2, sequence_parallel=True), PACKED),
    "embedding of one stage": (embedding_of_one_stage, Layout(pp=2, vpp=2), THREE),
    "keys keep their gradient": (keys_keep_their_gradient, Layout(cp=2), PACKED),
    "packed sequences meet": (packed_sequences_meet, Layout(), PACKED),
    "contiguous context": (contiguous_context, Layout(cp=2), Variant()),
    "first tokens are sampled": (first_tokens_are_sampled, Layout(), Variant(masked=True)),
    "responses are the normalizer": (responses_are_the_normalizer, Layout(), Variant(masked=True)),
}

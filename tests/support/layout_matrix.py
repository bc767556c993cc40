"""One update of a tiny policy under any layout, and everything that must not depend on the layout."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from tests.support.experiences import with_context
from tests.support.policies import build_actor, build_topology, fixed_batch, policy_config, tiny_hf_model

NUM_SEQUENCES = 12
BETA1 = 0.9


@dataclass(frozen=True)
class Layout:
    """A way to spread the model over the ranks at hand; data parallelism takes what is left."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    sequence_parallel: bool = False
    experts: bool = False
    tied: bool = True
    dtype: str = "fp32"

    def parallel(self) -> dict[str, Any]:
        names = ("tp", "pp", "vpp", "cp", "ep", "sequence_parallel")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Variant:
    """How the batch is cut: packed or padded, in about so many micro-batches per data-parallel rank.

    ``masked``: a tool said some of the response tokens.
    """

    packed: bool = False
    micro_batches: int = 1
    masked: bool = False

    def parallel(self, dp: int) -> dict[str, Any]:
        batch = fixed_batch(NUM_SEQUENCES).experience
        if not self.packed:
            return {"micro_batch_size": -(-NUM_SEQUENCES // dp // self.micro_batches)}
        tokens = len(batch.token_ids_L)
        room = 4 if self.micro_batches == 1 else 1.25
        return {"tokens_per_micro_batch": max(24, int(room * tokens / dp / self.micro_batches))}


VARIANTS = [Variant(packed, number) for packed in (False, True) for number in (1, 3)]
Mutation = Callable[[], AbstractContextManager[Any]]


def update(layout: Layout, variant: Variant, topology: Any, mutation: Mutation = nullcontext) -> dict[str, Any]:
    """Returns loss, entropies, gradients and weights of one update, whole tensors by Hugging Face name."""
    config = policy_config(
        model={"dtype": layout.dtype},
        parallel={**layout.parallel(), **variant.parallel(topology.dp)},
        data={"max_prompt_tokens": 8},
        rollout={"max_new_tokens": 8},
        optimizer={"clip_grad": 0.0, "beta1": BETA1},
    )
    model = tiny_hf_model(tied=layout.tied, num_layers=4, experts=layout.experts)
    actor = build_actor(config, topology=topology, model=model)
    batch = fixed_batch(NUM_SEQUENCES)
    if variant.masked:
        batch = with_context(batch)
    micros = actor._micro_batches(batch.experience, np.arange(NUM_SEQUENCES))
    with mutation():
        scores = actor.score(batch.experience)
        stats = actor.train(batch, seed=0, entropy_gradient=True)
    return {
        "micro_batches": len(micros),
        "logprob": scores.logprob_T,
        "entropy": scores.token_entropy_T,
        "sums": dict(stats.sums),
        "grad_norm": stats.grad_norm,
        "weights": {name: tensor.float().numpy().copy() for name, tensor in actor.hf_weights()},
        "gradients": _gradients(actor),
    }


@torch.no_grad()
def _gradients(actor: Any) -> dict[str, Any]:
    """Returns the reduced gradient of every Hugging Face tensor; the actor's weights are overwritten.

    Adam's first moment after one unclipped update from zero is (1 - beta1) times the gradient, and the distributed
    optimizer has each piece of it on one rank.
    """
    from megatron.core import parallel_state

    from aer_megatron.checkpoint.tensors import optimizer_pieces

    for parameter in actor.model.parameters():
        parameter.zero_()
    for piece in optimizer_pieces(actor):
        moment = piece.tensors()["exp_avg"].reshape(-1) / (1 - BETA1)
        piece.parameter.view(-1)[piece.start : piece.end] = moment.to(piece.parameter.dtype)
    for parameter in actor.model.parameters():
        of_experts = not getattr(parameter, "allreduce", True)
        dist.all_reduce(
            parameter,
            group=parallel_state.get_expert_data_parallel_group()
            if of_experts
            else parallel_state.get_data_parallel_group(with_context_parallel=True),
        )
    return {name: tensor.float().numpy().copy() for name, tensor in actor.hf_weights()}


def run_layouts(rank: int, world_size: int, layouts: list[Layout], variants: list[Variant]) -> list[list[Any]]:
    """Returns [layout][variant] -> result on rank 0 and None elsewhere; groups are built once per layout."""
    from aer_megatron.parallel.platform import install_platform

    install_platform()
    results = []
    for layout in layouts:
        topology = build_topology(policy_config(parallel=layout.parallel()))
        results.append([update(layout, variant, topology) for variant in variants])
    return results if rank == 0 else []


def whole(layout: Layout) -> Layout:
    """Returns the one-rank layout with the same model and numbers."""
    return replace(layout, tp=1, pp=1, vpp=1, cp=1, ep=1, sequence_parallel=False)


def differences(found: dict[str, Any], expected: dict[str, Any], *, rtol: float) -> list[str]:
    """Returns what is further apart than ``rtol``, relative to a tensor's largest element; empty if nothing is."""
    wrong = []
    for name, wanted in expected["sums"].items():
        if name not in found["sums"]:
            wrong.append(f"sums/{name} is missing")
            continue
        for got, value in zip(found["sums"][name], wanted, strict=True):
            if not np.isclose(got, value, rtol=rtol, atol=rtol):
                wrong.append(f"sums/{name} {got} {value}")
    if not np.isclose(found["grad_norm"], expected["grad_norm"], rtol=rtol):
        wrong.append(f"grad_norm {found['grad_norm']} {expected['grad_norm']}")
    for name in ("logprob", "entropy"):
        if not _close(found[name], expected[name], rtol):
            wrong.append(name)
    # AdamW divides by |gradient| + eps: near-zero gradients' rounding weighs lr / eps = 100 times as much in a weight
    for kind, tolerance in (("gradients", rtol), ("weights", 10 * rtol)):
        for name, tensor in expected[kind].items():
            if not _close(found[kind][name], tensor, tolerance):
                wrong.append(f"{kind}/{name} {_apart(found[kind][name], tensor):.1e}")
    return wrong


def gradient_distance(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """Returns the length of the difference of two whole gradients over the length of the second."""
    squares = [
        (np.square(found["gradients"][name] - tensor).sum(), np.square(tensor).sum())
        for name, tensor in expected["gradients"].items()
    ]
    difference, length = np.sum(squares, axis=0)
    return float(np.sqrt(difference / length))


def _apart(found: Any, expected: Any) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def _close(found: Any, expected: Any, rtol: float) -> bool:
    return bool(found.shape == expected.shape and np.isfinite(found).all() and _apart(found, expected) <= rtol)

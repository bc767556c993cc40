"""Values that are not finite, each planted into a tiny policy or its batch on one rank, and what the ranks then say."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from aer_megatron.actor.nonfinite_findings import Diagnosis
from aer_megatron.types import TrainBatch
from tests.support.actor_snapshots import differences, snapshot
from tests.support.policies import build_actor, fixed_batch, policy_config

NAN_WEIGHT = "decoder.layers.1.mlp.linear_fc2.weight"
NORM_WEIGHT = "decoder.layers.1.input_layernorm.weight"
FIRST_MATRIX = "decoder.layers.1.mlp.linear_fc1.weight"
SEQUENCE = 5  # of the batch; the one that a fault of a single sample hits


def parameter_of(actor: Any, name: str) -> Any:
    """Returns the parameter with this global name, None where another stage holds it."""
    from aer_megatron.actor.model import named_weights

    return dict(named_weights(actor.chunks)).get(name)


def plant_nan_weight(actor: Any, rank: int) -> None:
    """One NaN in a weight, on the last rank that holds it."""
    parameter = parameter_of(actor, NAN_WEIGHT)
    if parameter is not None and rank == actor.topology.world_size - 1:
        parameter.data.view(-1)[3] = math.nan


def plant_inf_gradient(actor: Any, rank: int) -> None:
    """A gradient that overflows on the last rank alone."""
    parameter = parameter_of(actor, NAN_WEIGHT)
    if parameter is not None and rank == actor.topology.world_size - 1:
        parameter.register_hook(lambda gradient: gradient * math.inf)


def plant_gradient_of_a_copy(actor: Any, rank: int) -> None:
    """A gradient of a parameter that all tensor-parallel ranks hold alike, on the last rank alone."""
    parameter = parameter_of(actor, NORM_WEIGHT)
    if parameter is not None and rank == actor.topology.world_size - 1:
        parameter.register_hook(lambda gradient: torch.full_like(gradient, math.nan))


def plant_once(actor: Any, rank: int) -> None:
    """A gradient that is NaN once, as a bit flip in flight would make it."""
    calls: list[int] = []

    def hook(gradient: Any) -> Any:
        calls.append(1)
        return gradient * math.nan if len(calls) == 1 else gradient

    parameter = parameter_of(actor, NAN_WEIGHT)
    if parameter is not None and rank == actor.topology.world_size - 1:
        parameter.register_hook(hook)


def plant_overflow(actor: Any, rank: int) -> None:
    """Finite weights whose product is beyond bf16, in one layer."""
    parameter = parameter_of(actor, FIRST_MATRIX)
    if parameter is not None:
        parameter.data.mul_(1e30)


def nan_advantage(batch: TrainBatch) -> TrainBatch:
    advantage_B = batch.advantage_B.copy()
    advantage_B[SEQUENCE] = math.nan
    return replace(batch, advantage_B=advantage_B)


def nan_rollout_logprob(batch: TrainBatch) -> TrainBatch:
    logprob_T = batch.experience.rollout_logprob_T.copy()
    logprob_T[int(batch.experience.response_length_B[:SEQUENCE].sum())] = math.nan
    return replace(batch, experience=replace(batch.experience, rollout_logprob_T=logprob_T))


def nan_old_logprob(batch: TrainBatch) -> TrainBatch:
    """A score that is NaN although the policy is well: the memory it lay in, say."""
    logprob_T = batch.old_logprob_T.copy()
    logprob_T[int(batch.experience.response_length_B[:SEQUENCE].sum())] = math.nan
    return replace(batch, old_logprob_T=logprob_T)


def giant_advantage(batch: TrainBatch) -> TrainBatch:
    """Finite in float64, in which rewards are; infinite in float32, in which the loss is."""
    advantage_B = batch.advantage_B.copy()
    advantage_B[SEQUENCE] = 1e300
    return replace(batch, advantage_B=advantage_B)


def infinite_advantage_term(batch: TrainBatch) -> TrainBatch:
    """Finite inputs whose product overflows float32 in the loss of one sequence."""
    advantage_B = batch.advantage_B.copy()
    advantage_B[SEQUENCE] = 3e38
    old = batch.old_logprob_T.copy()
    start = int(batch.experience.response_length_B[:SEQUENCE].sum())
    old[start : start + int(batch.experience.response_length_B[SEQUENCE])] = -40.0
    return replace(batch, advantage_B=-advantage_B, old_logprob_T=old)


ACTOR_FAULTS: dict[str, Callable[[Any, int], None]] = {
    "nan weight": plant_nan_weight,
    "inf gradient": plant_inf_gradient,
    "gradient of a copy": plant_gradient_of_a_copy,
    "once": plant_once,
    "bf16 overflow": plant_overflow,
}
BATCH_FAULTS: dict[str, Callable[[TrainBatch], TrainBatch]] = {
    "nan advantage": nan_advantage,
    "nan rollout logprob": nan_rollout_logprob,
    "nan old logprob": nan_old_logprob,
    "giant advantage": giant_advantage,
    "overflow in the loss": infinite_advantage_term,
}


def update_with(fault: str, rank: int, layout: dict[str, Any]) -> dict[str, Any]:
    """Returns what one rank saw of an update with a fault: the diagnosis, and which tensors it moved."""
    config = policy_config(parallel=layout, model={"dtype": "bf16" if fault == "bf16 overflow" else "fp32"})
    actor, batch = build_actor(config), fixed_batch()
    actor.train(batch, seed=0, entropy_gradient=True)  # a good one, so that there is an optimizer state to lose
    if fault in ACTOR_FAULTS:
        ACTOR_FAULTS[fault](actor, rank)
    bad = BATCH_FAULTS[fault](batch) if fault in BATCH_FAULTS else batch
    before, heard = snapshot(actor), list[Diagnosis]()
    stats = actor.train(bad, seed=0, entropy_gradient=True, report=heard.append)
    after = snapshot(actor)
    result = {
        "diagnoses": heard,
        "moved": differences(_bits(before), _bits(after)),
        "skipped": stats.updates_skipped,
        "num_updates": actor.num_updates,
        "sums": dict(stats.sums),
        "stopped": _message_of(actor, bad) if fault != "once" else "",
    }
    if fault in BATCH_FAULTS or fault == "once":  # the run goes on as if the update had not been there
        result["after"] = actor.train(batch, seed=0, entropy_gradient=True).grad_norm
        same = build_actor(config)
        same.train(batch, seed=0, entropy_gradient=True)
        result["expected_after"] = same.train(batch, seed=0, entropy_gradient=True).grad_norm
    return result


def _message_of(actor: Any, batch: TrainBatch) -> str:
    try:
        actor.train(batch, seed=0, entropy_gradient=True)
    except RuntimeError as error:
        return str(error)
    return ""


def _bits(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """NaN differs from itself; its bits do not."""
    return {name: value.contiguous().view(-1).view(torch.uint8) for name, value in tensors.items()}

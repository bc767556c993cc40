"""Values that are not finite, each planted into a tiny policy or its batch on one rank, and what the ranks then say."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from aer_megatron.algo.nonfinite import Diagnosis
from aer_megatron.types import TrainBatch
from tests.support.actor_snapshots import differences, snapshot
from tests.support.policies import build_actor, fixed_batch, policy_config

NAN_WEIGHT = "decoder.layers.1.mlp.linear_fc2.weight"
NORM_WEIGHT = "decoder.layers.1.input_layernorm.weight"
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

    if rank == actor.topology.world_size - 1:
        parameter_of(actor, NAN_WEIGHT).register_hook(hook)


def nan_advantage(batch: TrainBatch) -> TrainBatch:
    advantage_B = batch.advantage_B.copy()
    advantage_B[SEQUENCE] = math.nan
    return replace(batch, advantage_B=advantage_B)


def nan_rollout_logprob(batch: TrainBatch) -> TrainBatch:
    logprob_T = batch.experience.rollout_logprob_T.copy()
    logprob_T[int(batch.experience.response_length_B[:SEQUENCE].sum())] = math.nan
    return replace(batch, experience=replace(batch.experience, rollout_logprob_T=logprob_T))


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
}
BATCH_FAULTS: dict[str, Callable[[TrainBatch], TrainBatch]] = {
    "nan advantage": nan_advantage,
    "nan rollout logprob": nan_rollout_logprob,
    "overflow in the loss": infinite_advantage_term,
}


def update_with(fault: str, rank: int, layout: dict[str, Any], *, dtype: str = "fp32") -> dict[str, Any]:
    """Returns what one rank saw of an update with a fault: the diagnosis, and which tensors it moved."""
    config = policy_config(parallel=layout, model={"dtype": dtype})
    actor, batch = build_actor(config), fixed_batch()
    actor.train(batch, seed=0, entropy_gradient=True)  # a good one, so that there is an optimizer state to lose
    plant = ACTOR_FAULTS.get(fault)
    if plant is not None:
        plant(actor, rank)
    bad = BATCH_FAULTS[fault](batch) if fault in BATCH_FAULTS else batch
    before, heard = snapshot(actor), list[Diagnosis]()
    stats = actor.train(bad, seed=0, entropy_gradient=True, report=heard.append)
    moved = [name for name in differences(before, snapshot(actor)) if not bool(before[name].isnan().any())]
    result = {
        "text": [diagnosis.text() for diagnosis in heard],
        "findings": [finding for diagnosis in heard for finding in diagnosis.findings],
        "moved": moved,
        "skipped": stats.updates_skipped,
        "num_updates": actor.num_updates,
        "grad_norm": stats.grad_norm,
    }
    if fault in BATCH_FAULTS or fault == "once":  # the run goes on
        result["after"] = actor.train(batch, seed=0, entropy_gradient=True).grad_norm
    return result


def ranks_and_layouts() -> dict[str, dict[str, Any]]:
    """Returns the two-rank layouts by name."""
    return {"tp2": {"tp": 2}, "pp2": {"pp": 2}, "dp2": {}, "packed": {"tokens_per_micro_batch": 2048}}


def is_finite(value: float) -> bool:
    return bool(np.isfinite(value))

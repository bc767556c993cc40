"""The layouts that the doctor measures on the ranks at hand, and the measurement of one of them.

run configuration --doctor_config--> the same with a plain loss and a linear step --variants--> one per layout
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from aer_megatron.actor.actor import Actor
from aer_megatron.compose.common import build_actor, build_topology
from aer_megatron.compose.step_plan import StepPlan
from aer_megatron.config import Config
from aer_megatron.convert.architecture import ModelArchitecture, check_parallel, pad_query_groups
from aer_megatron.doctor.layout_comparison import Measurement, tensor_sketch
from aer_megatron.parallel.platform import Platform
from aer_megatron.parallel.topology import leave_layout
from aer_megatron.types import Float64Array, TrainBatch

OWN = "the run's layout"
_STEP = 0.03  # length of the optimizer step as a share of the weights'
_CLIP, _EPS = 1e-3, 0.1  # every |gradient| <= clip << eps: Adam's step is lr * gradient / eps, linear in the gradient

# one rank's share of everything, from which the layouts below depart
_WHOLE: dict[str, Any] = {
    "parallel.tp": 1,
    "parallel.pp": 1,
    "parallel.vpp": 1,
    "parallel.cp": 1,
    "parallel.ep": 1,
    "parallel.sequence_parallel": False,
    "parallel.tokens_per_micro_batch": 0,
}


@dataclass(frozen=True, slots=True)
class Variant:
    """A layout to measure. ``axes`` are the parallel axes and forms by which layouts differ, in words."""

    name: str
    axes: frozenset[str]
    config: Config


def doctor_config(config: Config, *, num_sequences: int, weight_norm: float) -> Config:
    """Returns the run's configuration with a loss and an optimizer step that can be compared across layouts.

    The loss is the clipped surrogate with an entropy bonus, without what draws random tokens or needs another model.
    Adam with a tiny eps turns the rounding of a near-zero gradient into a whole step, so eps and the gradient's bound
    are set to where its step is linear, and the learning rate to where the step is 3 % of the weights' length.
    """
    return config.with_options(
        {
            "rollout.prompts_per_step": num_sequences // 2,
            "rollout.group_size": 2,
            "rollout.staleness": 0,
            "algo.num_minibatches": 1,
            "algo.policy_loss": {"kind": "clip"},
            "algo.kl_coefficient": 0.0,
            "algo.correction": {"weight": "none"},
            "algo.overlong_buffer": 0,
            "report.flight_recorder": False,
            "optimizer.lr": _STEP * weight_norm * _EPS / _CLIP,
            "optimizer.warmup_steps": 0,
            "optimizer.decay": "constant",
            "optimizer.eps": _EPS,
            "optimizer.clip_grad": _CLIP,
            "optimizer.weight_decay": 0.0,
        },
    )


def variants(
    config: Config, arch: ModelArchitecture, *, num_ranks: int, num_sequences: int, longest: int, free_bytes: int
) -> tuple[list[Variant], list[tuple[str, str]]]:
    """Returns (the layouts that fit, the run's first; the others with the reason why they are left out)."""
    fitting, left_out, seen = [], [], []
    for name, changes in _table(config, arch, num_ranks, num_sequences, longest):
        try:
            candidate = config.with_options(changes)
            dp = candidate.check_world_size(num_ranks)
            parallel = candidate.parallel
            plan = StepPlan(candidate, arch)
            layout = plan.own_layout(num_ranks)
            padded = pad_query_groups(arch, parallel.tp)
            check_parallel(padded, parallel.tp, parallel.pp, vpp=parallel.vpp, ep=parallel.ep)
        except ValueError as error:
            left_out.append((name, str(error)))
            continue
        needed = plan.training_memory(layout, 1)[1].constant
        if name != OWN and needed > free_bytes:
            left_out.append((name, f"needs {needed / 1e9:.1f} GB a rank, {free_bytes / 1e9:.1f} GB are free"))
        elif (key := (parallel, candidate.model.head, candidate.megatron)) not in seen:
            seen.append(key)
            fitting.append(Variant(name, _axes(candidate, dp, num_sequences), candidate))
    return fitting, left_out


def _table(
    config: Config, arch: ModelArchitecture, num_ranks: int, num_sequences: int, longest: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (name, changes) of every layout worth measuring: each axis alone, then the usual pairs."""
    whole = _WHOLE | {"parallel.micro_batch_size": num_sequences}
    packed = {"rollout.max_new_tokens": longest - 1, "data.max_prompt_tokens": 1}
    sizes = sorted({size for size in (2, num_ranks) if size > 1 and num_ranks % size == 0})
    yield OWN, {}
    yield (f"dp {num_ranks}" if num_ranks > 1 else "one rank"), whole
    yield "micro-batches of 1", whole | {"parallel.micro_batch_size": 1}
    for size in sizes:
        tensor = {"parallel.tp": size, "parallel.sequence_parallel": arch.moe is not None}
        if arch.moe is None:
            yield f"tp {size}", whole | tensor
        yield f"tp {size} sp", whole | tensor | {"parallel.sequence_parallel": True, "parallel.micro_batch_size": 4}
        yield f"pp {size}", whole | {"parallel.pp": size, "parallel.micro_batch_size": 3}
        yield f"pp {size} vpp 2", whole | {"parallel.pp": size, "parallel.vpp": 2, "parallel.micro_batch_size": 2}
        yield f"cp {size}", whole | {"parallel.cp": size}
        if arch.moe is not None:
            yield f"ep {size}", whole | {"parallel.ep": size}
    if num_ranks % 4 == 0:
        yield "tp 2 pp 2 sp", whole | {"parallel.tp": 2, "parallel.pp": 2, "parallel.sequence_parallel": True}
        yield "cp 2 tp 2 sp", whole | {"parallel.cp": 2, "parallel.tp": 2, "parallel.sequence_parallel": True}
    yield "packed", whole | packed | {"parallel.tokens_per_micro_batch": _budget(longest, 1)}
    if sizes:
        budget = {"parallel.tokens_per_micro_batch": _budget(longest, 4)}
        yield "packed cp 2", whole | packed | budget | {"parallel.cp": 2}
    yield "other head", {"model.head": "logits" if config.model.head == "fused" else "fused"}
    if not config.megatron.get("recompute_granularity"):
        full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
        yield "recompute full", {"megatron": dict(config.megatron) | full}


def _budget(longest: int, multiple: int) -> int:
    return -(-longest // multiple) * multiple


def _axes(config: Config, dp: int, num_sequences: int) -> frozenset[str]:
    parallel = config.parallel
    present = {
        "tensor parallelism": parallel.tp > 1,
        "sequence parallelism": parallel.sequence_parallel,
        "pipeline parallelism": parallel.pp > 1,
        "interleaved pipeline": parallel.vpp > 1,
        "context parallelism": parallel.cp > 1,
        "expert parallelism": parallel.ep > 1,
        "data parallelism": dp > 1,
        "micro-batches": not parallel.tokens_per_micro_batch and parallel.micro_batch_size < num_sequences // dp,
        "packing": parallel.tokens_per_micro_batch > 0,
        "whole logits": config.model.head == "logits",
        "recomputation": bool(config.megatron.get("recompute_granularity")),
    }
    return frozenset(axis for axis, is_present in present.items() if is_present)


@contextmanager
def built(variant: Variant, platform: Platform, get: Callable[[str], Tensor]) -> Iterator[Actor]:
    """Yields the policy in the variant's layout with the weights of ``get``; leaves the layout afterwards."""
    config = variant.config
    try:
        actor = build_actor(
            config,
            config.model.path,
            platform,
            build_topology(config),
            optimizer=config.optimizer,
            num_updates=1,
        )
        actor.load_hf_weights(get)
        yield actor
    finally:
        leave_layout()


def measure(
    actor: Actor, variant: Variant, batch: TrainBatch, before_C: Mapping[str, Float64Array] | None
) -> Measurement:
    """Returns the variant's numbers; the weights have moved by one step when it returns.

    ``before_C``: sketches of the weights before the step, on the rank that compares steps; None on the others.
    """
    scores = actor.score(batch.experience)
    stats = actor.train(batch, seed=0, entropy_gradient=True)
    num_tokens = batch.experience.num_sampled_tokens
    step_C = {}
    for name, tensor in actor.hf_weights():
        if before_C is not None:
            step_C[name] = tensor_sketch(tensor) - before_C[name]
    return Measurement(
        name=variant.name,
        axes=variant.axes,
        logprob_T=scores.logprob_T,
        token_entropy_T=scores.token_entropy_T,
        loss=(stats.sums["policy_loss"][0] - stats.sums["entropy_bonus"][0]) / num_tokens,
        token_entropy=stats.mean("token_entropy"),
        grad_norm=stats.grad_norm,
        step_C=step_C,
    )


def longest_probe(config: Config, arch: ModelArchitecture, *, limit: int) -> int:
    """Returns the length of the longest sequence to measure with: the run's own, up to ``limit``."""
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    return max(2, min(longest, arch.max_positions, limit))

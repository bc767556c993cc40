"""The search for layouts: which the model, the batch and the GPUs allow, what each costs, and which fit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from aer_megatron.compose.step_plan import StepPlan
from aer_megatron.convert.architecture import check_parallel, pad_query_groups
from aer_megatron.costs.hardware import Gpu
from aer_megatron.costs.model_size import Layout
from aer_megatron.costs.step import Candidate, step_time, step_traffic

MAX_CHUNKS = 4  # model chunks per pipeline rank that are tried: more of them send more and hide less


@dataclass(frozen=True, slots=True)
class Setting:
    """What is asked for."""

    plan: StepPlan
    gpu: Gpu
    num_gpus: int
    reserve: float  # share of a GPU's memory that is left to CUDA, NCCL and fragmentation
    rollout_share: float  # share that co-located rollout servers hold

    @property
    def usable_bytes(self) -> float:
        return self.gpu.memory_bytes * (1 - self.reserve)


def check_layout(setting: Setting) -> None:
    """Raises ValueError where the run file's own layout is impossible on these GPUs, naming the remedy."""
    config, arch = setting.plan.config, setting.plan.arch
    parallel = config.parallel
    config.check_world_size(setting.num_gpus)
    check_parallel(pad_query_groups(arch, parallel.tp), parallel.tp, parallel.pp, vpp=parallel.vpp, ep=parallel.ep)
    if arch.moe and parallel.tp > 1 and not parallel.sequence_parallel:
        raise ValueError(f"parallel.tp={parallel.tp} with experts needs parallel.sequence_parallel=true; set it")
    setting.plan.check_positions()


def own_candidate(setting: Setting) -> Candidate:
    """Returns the run file's own layout and micro-batch size, whether they fit or not."""
    layout = setting.plan.own_layout(setting.num_gpus)
    return evaluate(setting, layout, setting.plan.own_micro_batch_size(layout))


def possible_layouts(setting: Setting) -> Iterator[Layout]:
    """Yields the layouts that the model and the batch allow: tp inside a node, no padded heads."""
    config, arch, num_gpus = setting.plan.config, setting.plan.arch, setting.num_gpus
    for tp, pp, cp, ep in itertools.product(
        range(1, min(num_gpus, setting.gpu.gpus_per_node) + 1),
        range(1, min(num_gpus, arch.num_layers) + 1),
        _context_sizes(setting),
        range(1, min(num_gpus, arch.moe.num_experts if arch.moe else 1) + 1),
    ):
        if num_gpus % (tp * pp * cp) or num_gpus // (tp * pp) % ep:
            continue
        try:
            sizes = {"tp": tp, "pp": pp, "cp": cp, "ep": ep}
            dp = config.with_options({"parallel": sizes}).check_world_size(num_gpus)
        except ValueError:  # no multiple of it is a mini-batch: not a layout
            continue
        for vpp in sorted({*range(1, MAX_CHUNKS + 1), config.parallel.vpp}) if pp > 1 else (1,):
            try:
                check_parallel(arch, tp, pp, vpp=vpp, ep=ep)
            except ValueError:  # this one does not fit the model
                continue
            for sequence_parallel in (False, True) if tp > 1 and not arch.moe else (tp > 1,):
                yield Layout(tp, pp, dp, ep, sequence_parallel, "none", cp, vpp)
                yield Layout(tp, pp, dp, ep, sequence_parallel, "full", cp, vpp)


def _context_sizes(setting: Setting) -> list[int]:
    """Returns powers of two, and the run file's own, that leave each rank two chunks of the longest sequence."""
    powers = {1 << k for k in range(setting.num_gpus.bit_length())}
    return sorted(cp for cp in powers | {setting.plan.config.parallel.cp} if cp == 1 or 2 * cp <= setting.plan.longest)


def fitting_candidates(setting: Setting) -> Iterator[Candidate]:
    """Yields the best candidate of every (tp, pp, cp, dp, ep) that fits, by estimated time, best first."""
    best: dict[tuple[int, ...], Candidate] = {}
    for layout in possible_layouts(setting):
        key = (layout.tp, layout.pp, layout.cp, layout.dp, layout.ep)
        for size in _micro_batch_sizes(setting, layout):
            candidate = evaluate(setting, layout, size)
            if candidate.peak_bytes > setting.usable_bytes:
                break
            if key not in best or candidate.time.total < best[key].time.total:
                best[key] = candidate
    yield from sorted(best.values(), key=lambda candidate: candidate.time.total)


def token_budget(setting: Setting, layout: Layout) -> int:
    """Returns the most tokens of a micro-batch that fit, in whole sequences of the longest length; 0 if none does."""
    fits, too_many = 0, setting.plan.work.sequences // setting.plan.work.minibatches // layout.dp + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if evaluate(setting, layout, middle).peak_bytes <= setting.usable_bytes:
            fits = middle
        else:
            too_many = middle
    return fits * setting.plan.longest


def _micro_batch_sizes(setting: Setting, layout: Layout) -> Iterator[int]:
    share = setting.plan.work.sequences // setting.plan.work.minibatches // layout.dp
    size = 1
    while size <= share:
        yield size
        size *= 2


def evaluate(setting: Setting, layout: Layout, micro_batch_size: int) -> Candidate:
    """Returns the cost of one layout."""
    plan, work = setting.plan, setting.plan.work
    arch, form = pad_query_groups(plan.arch, layout.tp), plan.training_form(layout)
    stage, memory = plan.training_memory(layout, micro_batch_size)
    micro_tokens = plan.batch_shape(layout, micro_batch_size).tokens // layout.cp
    together = plan.decoded_together(layout)
    return Candidate(
        layout=layout,
        micro_batch_size=micro_batch_size,
        stage=stage,
        memory=memory,
        engine=plan.engine_memory(layout),
        served=setting.rollout_share * setting.gpu.memory_bytes,
        traffic=step_traffic(arch, work, layout, form),
        time=step_time(arch, work, layout, form, setting.gpu, micro_tokens=micro_tokens, batch=together),
    )

"""Tokens, floating-point operations, communication and an ESTIMATED time of one training step, from shapes alone.

Counts are exact for the shapes given. The time is an estimate that nobody has measured: it divides the counts by the
data-sheet peaks of costs/hardware.py, scaled by the assumptions named below, and overlaps nothing.

N matrix elements that a token meets (layers only), D tokens, S length, Q query columns, H hidden size, V vocabulary.
A forward pass costs 2 N D for the layers, 4 S^2 Q per sequence and layer for attention (half where the kernel skips
what is above the diagonal), and 2 H V per scored token for the head; a backward pass costs twice that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from aer_megatron.costs.hardware import Gpu
from aer_megatron.costs.memory import EngineMemory, StageMemory, TrainingForm, kv_bytes_per_token, peak_bytes
from aer_megatron.costs.model_size import (
    Layout,
    ModelSizes,
    active_matrix_parameters,
    kv_width,
    parameter_count,
    query_width,
    rank_parameters,
)

# Assumptions of the time estimate, to be replaced by measurements.
ASSUMED_UTILISATION = 0.45  # share of peak that large matrix products reach
ASSUMED_HALF_TOKENS = 1024  # tokens of a micro-batch at which that share is halved
ASSUMED_BANDWIDTH = 0.7  # share of peak that collectives and memory reads reach
ASSUMED_FP32_SHARE = 1 / 16  # fp32 matrix products without tensor cores against bf16 ones with
ASSUMED_EAGER_LAYER_S = 0.6e-3  # launch cost of one decoder layer in the embedded engine's token step


@dataclass(frozen=True, slots=True)
class Workload:
    """One step's rollout batch. ``passes`` counts forward passes beside training: scoring, and the reference's."""

    sequences: int
    prompt_tokens: int  # mean per sequence
    response_tokens: int  # mean per sequence
    minibatches: int
    passes: int

    @property
    def length(self) -> int:
        return self.prompt_tokens + self.response_tokens

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    @property
    def scored_tokens(self) -> int:
        return self.sequences * self.response_tokens


@dataclass(frozen=True, slots=True)
class StepFlops:
    """Floating-point operations of one step over all ranks; ``model`` is the 6 N D + attention of the update alone."""

    model: float
    score: float
    train: float  # with what is computed again
    rollout: float


@dataclass(frozen=True, slots=True)
class StepTraffic:
    """Bytes that one rank sends in one step, by parallel axis."""

    tensor: float
    context: float
    pipeline: float
    data: float
    weight_sync: float


@dataclass(frozen=True, slots=True)
class StepTime:
    """Estimated seconds of the parts of a step."""

    rollout: float
    score: float
    train: float
    sync: float

    @property
    def total(self) -> float:
        return self.rollout + self.score + self.train + self.sync


@dataclass(frozen=True, slots=True)
class Candidate:
    """A layout with a micro-batch size and what they cost; ``stage`` is the pipeline stage that needs the most."""

    layout: Layout
    micro_batch_size: int
    stage: int
    memory: StageMemory
    engine: EngineMemory
    served: float  # bytes of co-located rollout servers
    traffic: StepTraffic
    time: StepTime

    @property
    def peak_bytes(self) -> float:
        """What the rank needs, and the co-located servers beside it."""
        return peak_bytes(self.memory, self.engine) + self.served


def forward_flops(
    model: ModelSizes, *, tokens: float, squared_lengths: float, scored_tokens: float, attention: str
) -> tuple[float, float, float]:
    """Returns the operations of a forward pass in (layers, attention, head), over all ranks.

    Args:
        squared_lengths: sum of the squares of the sequences' lengths.
        attention: as in ``TrainingForm``: "flash" skips what is above the diagonal.
    """
    layers = 2.0 * active_matrix_parameters(model) * tokens
    causal = 0.5 if attention == "flash" else 1.0
    scores = 4.0 * causal * model.num_layers * query_width(model) * squared_lengths
    return layers, scores, 2.0 * model.hidden_size * model.vocab_size * scored_tokens


def step_flops(model: ModelSizes, work: Workload, layout: Layout, form: TrainingForm) -> StepFlops:
    """Returns the operations of one step. The fused head computes its logits a second time in the backward pass."""
    layers, attention, head = forward_flops(
        model,
        tokens=work.tokens,
        squared_lengths=work.sequences * work.length**2,
        scored_tokens=work.scored_tokens,
        attention=form.attention,
    )
    again = {"none": 0.0, "selective": attention, "full": layers + attention}[layout.recompute]
    again += head if form.head == "fused" else 0.0
    forward = layers + attention + head
    prefill = layers * work.prompt_tokens / max(1, work.length)
    decode = 2.0 * work.scored_tokens * (active_matrix_parameters(model) + model.hidden_size * model.vocab_size)
    return StepFlops(
        model=3 * forward, score=work.passes * forward, train=3 * forward + again, rollout=prefill + decode
    )


def step_traffic(model: ModelSizes, work: Workload, layout: Layout, form: TrainingForm) -> StepTraffic:
    """Returns what one rank of the first stage sends.

    Tensor parallelism: two all-reduces per layer and pass (with sequence parallelism two reduce-scatters and two
    all-gathers, the same bytes, and one more all-gather per layer input in the backward pass), each 2 (tp - 1) / tp of
    the rows. Context parallelism: keys and values of a rank's tokens to each other rank, per layer and pass. Data
    parallelism: fp32 gradients reduce-scattered, weights all-gathered, per mini-batch. Weight sync: a
    rank receives the whole model but for its own part.
    """
    size = form.dtype_bytes
    tokens = work.tokens / layout.num_replicas
    rows = tokens * model.hidden_size * size
    ring = 2.0 * (layout.tp - 1) / layout.tp
    passes = work.passes + 2 + (1 if layout.recompute == "full" else 0)
    per_layer = 2 * passes * ring + (2 * ring / 2 if layout.sequence_parallel else 0.0)
    held = rank_parameters(model, layout, stage=0, vocab_rows=form.vocab_rows)
    replicas, expert_dp = layout.num_replicas, layout.num_replicas / layout.ep
    share = (replicas - 1) / replicas * held.dense + (expert_dp - 1) / expert_dp * held.experts
    crossings = (work.passes + 2) * layout.vpp if layout.pp > 1 else 0
    context = passes * (layout.cp - 1) * tokens * 2 * kv_width(model) / layout.tp * size
    return StepTraffic(
        tensor=model.num_layers / layout.pp * rows * per_layer,
        context=model.num_layers / layout.pp * context,
        pipeline=crossings * rows / layout.sequence_shards,
        data=work.minibatches * share * (4 + size),
        weight_sync=parameter_count(model) * size * (1 - 1 / (layout.tp * layout.pp * layout.ep)),
    )


def step_time(
    model: ModelSizes, work: Workload, layout: Layout, form: TrainingForm, gpu: Gpu, *, micro_tokens: int, batch: int
) -> StepTime:
    """Returns the estimated seconds of a step with micro-batches of ``micro_tokens`` tokens per rank.

    ``batch`` is the number of sequences that one rank decodes together, 0 where the rollouts run elsewhere.
    """
    flops, traffic = step_flops(model, work, layout, form), step_traffic(model, work, layout, form)
    peak = gpu.bf16_flops * (ASSUMED_FP32_SHARE if form.dtype_bytes == 4 else 1)
    speed = peak * ASSUMED_UTILISATION * micro_tokens / (micro_tokens + ASSUMED_HALF_TOKENS)
    inside, between = gpu.nvlink_bandwidth * ASSUMED_BANDWIDTH, gpu.network_bandwidth * ASSUMED_BANDWIDTH
    one_node = layout.num_ranks <= gpu.gpus_per_node
    data_link = inside if one_node else between
    stage_link = inside if layout.tp * layout.num_replicas < gpu.gpus_per_node or one_node else between
    micro_batches = math.ceil(work.tokens / work.minibatches / layout.num_replicas / max(1, micro_tokens))
    bubble = 1 + (layout.pp - 1) / max(1, micro_batches) / layout.vpp
    context_link = inside if layout.tp * layout.cp <= gpu.gpus_per_node else between
    wire = traffic.tensor / inside + traffic.context / context_link + traffic.pipeline / stage_link
    passes = work.passes + 2
    return StepTime(
        rollout=_rollout_time(model, work, form, gpu, ranks=layout.num_ranks, batch=batch) if batch else 0.0,
        score=bubble * (flops.score / layout.num_ranks / speed + wire * work.passes / passes),
        train=bubble * (flops.train / layout.num_ranks / speed + wire * 2 / passes) + traffic.data / data_link,
        sync=traffic.weight_sync / (inside if layout.tp * layout.pp <= gpu.gpus_per_node else between),
    )


def _rollout_time(model: ModelSizes, work: Workload, form: TrainingForm, gpu: Gpu, *, ranks: int, batch: int) -> float:
    """Token steps one after the other: each launches every layer and reads the weights and half of a full cache."""
    mine = math.ceil(work.sequences / ranks)
    rounds = math.ceil(mine / batch)
    together = min(mine, batch)
    cache = together * (work.prompt_tokens + work.response_tokens / 2) * kv_bytes_per_token(model, form.dtype_bytes)
    read = (parameter_count(model) * form.dtype_bytes + cache) / (gpu.memory_bandwidth * ASSUMED_BANDWIDTH)
    launch = model.num_layers * ASSUMED_EAGER_LAYER_S
    attend = together * 4.0 * work.length * query_width(model) * model.num_layers
    compute = (2.0 * together * active_matrix_parameters(model) + attend) / (gpu.bf16_flops * ASSUMED_UTILISATION)
    return rounds * work.response_tokens * max(read, launch, compute)


def fits_kv(model: ModelSizes, form: TrainingForm, share_bytes: float, *, tp: int) -> int:
    """Returns the tokens of KV cache that a co-located server of ``tp`` ranks holds per rank group in its share.

    The server's weights are split over ``tp``; its KV heads too, as far as there are any.
    """
    weights = parameter_count(model) * form.dtype_bytes / tp
    heads = max(1, model.padded_kv_heads // tp)
    per_token = kv_bytes_per_token(model, form.dtype_bytes) * heads * model.head_dim / kv_width(model)
    return max(0, int((share_bytes - weights) / per_token))

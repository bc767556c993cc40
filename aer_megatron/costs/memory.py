"""Memory of one rank, term by term, from shapes alone.

    constant   weights, fp32 gradient buffer, the rank's share of AdamW's state
    training   activations that wait for their backward pass, head, working memory of the backward pass
    rollout    the embedded engine's weights (constant), KV cache and decoding buffers; weight sync stages a second copy

Training, rollout and weight sync do not overlap, so a rank's peak is the constant part plus the largest of the three.
Activations are what autograd keeps, read off the layers that actor/ builds, for two kinds: `local` (Megatron-Core's
own layers around PyTorch's attention kernel, the form that runs on a CPU; checked against storage-tracked updates) and
`flash` (TransformerEngine layers, the form of a GPU; not yet measured). Neither holds a score matrix.

Widths per token and rank: H hidden, Q query heads, K key heads, F feed-forward. s tokens of a micro-batch, t of them
response tokens, W vocabulary rows of a rank. All results are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from aer_megatron.costs.model_size import Layout, ModelSizes, kv_width, parameter_count, query_width, rank_parameters

HeadForm = Literal["fused", "logits", "textbook"]

DTYPE_BYTES = {"fp32": 4, "bf16": 2}  # of weights and activations, by model.dtype
# what the head works with at a time (parallel/): float32 bytes of a chunk of logits on a GPU, which wants few and large
# launches, and rows of the head in one mixed-precision product, whose float32 result stays small
DEVICE_CHUNK_BYTES = 1 << 28
WEIGHT_BLOCK = 8192

_FP32 = 4


@dataclass(frozen=True, slots=True)
class BatchShape:
    """A padded micro-batch: ``sequences`` rows of ``length`` tokens, ``responses`` response tokens in all."""

    sequences: int
    length: int
    responses: int

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


@dataclass(frozen=True, slots=True)
class TrainingForm:
    """Which kernels and number formats the update uses."""

    dtype_bytes: int  # of weights and activations
    attention: Literal["local", "flash"]
    head: HeadForm
    vocab_rows: int  # padded vocabulary of all ranks
    chunk_bytes: int = DEVICE_CHUNK_BYTES
    fused_swiglu: bool = False  # megatron.bias_activation_fusion
    on_cpu: bool = False  # PyTorch kernels with chunk buffers instead of Triton's; gloo instead of NCCL


@dataclass(frozen=True, slots=True)
class StageMemory:
    """Bytes of one rank of a pipeline stage while it trains."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    working: int

    @property
    def constant(self) -> int:
        return self.weights + self.gradients + self.optimizer

    @property
    def transient(self) -> int:
        return self.activations + self.head + self.working

    @property
    def total(self) -> int:
        return self.constant + self.transient

    @property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint from this rank, of host memory under run.async_checkpoint, at most.

        The weights are written by one replica only; the others hold their share of the optimizer's state.
        """
        return self.weights + self.optimizer


@dataclass(frozen=True, slots=True)
class LayerMemory:
    """Bytes that one layer's forward pass leaves for its backward pass."""

    norms: int
    attention: int
    mlp: int

    @property
    def total(self) -> int:
        return self.norms + self.attention + self.mlp


@dataclass(frozen=True, slots=True)
class _Widths:
    hidden: int
    query: int
    kv: int
    mixed: int  # the fused query-key-value row that views keep alive
    ffn: int  # of the experts that a token meets, for a mixture


def _widths(model: ModelSizes, layout: Layout) -> _Widths:
    query, kv = query_width(model), kv_width(model)
    few_kv_heads = layout.tp > model.padded_kv_heads  # the fused row is gathered over tp, see Megatron's attention
    ffn = model.ffn_hidden_size if model.moe is None else model.moe.top_k * model.moe.ffn_hidden_size
    return _Widths(
        hidden=model.hidden_size,
        query=query // layout.tp,
        kv=model.head_dim if few_kv_heads else kv // layout.tp,
        mixed=query + 2 * kv if few_kv_heads else (query + 2 * kv) // layout.tp,
        ffn=ffn // layout.tp,
    )


def layer_activations(model: ModelSizes, layout: Layout, batch: BatchShape, form: TrainingForm) -> LayerMemory:
    """Returns what one layer keeps; ``layout.recompute`` = "selective" drops what core attention can make again.

    Local norms keep their input, the normalised rows and their product with the weight; TransformerEngine's keep input
    and output. SwiGLU without fusion keeps both halves of its input twice over: 2 F rows, silu, the shifted half, the
    product.
    """
    width, tokens, size = _widths(model, layout), batch.tokens, form.dtype_bytes
    norm_rows = 3 if form.attention == "local" else 2
    mlp_rows = 3 if form.fused_swiglu else 5
    mlp = tokens * size * mlp_rows * width.ffn
    if model.moe is not None:  # rows of tokens as dispatched and as returned, router logits and probabilities
        mlp += tokens * (2 * model.moe.top_k * width.hidden * size + 2 * model.moe.num_experts * _FP32)
    return LayerMemory(
        norms=tokens * size * 2 * norm_rows * width.hidden // layout.sequence_shards,
        attention=_attention(model, layout, batch, form),
        mlp=mlp,
    )


def _attention(model: ModelSizes, layout: Layout, batch: BatchShape, form: TrainingForm) -> int:
    width, tokens, size = _widths(model, layout), batch.tokens, form.dtype_bytes
    keep_core = layout.recompute != "selective"
    columns = 2 * width.query + width.mixed  # rotated queries, context; key or value are views of the fused row
    if model.qk_norm and width.kv > model.head_dim:
        columns += width.query  # copied for its norm; with one key head per rank it is a plain view
    statistics = tokens * model.padded_heads // layout.tp * _FP32 if keep_core else 0
    if form.attention == "flash":
        columns += (2 if model.qk_norm else 1) * width.kv + width.kv  # key copied for its norm, rotated key, value
        return tokens * size * columns + statistics
    columns += width.kv  # rotated key
    if model.qk_norm:
        columns += width.query + width.kv  # normalised rows
    if keep_core and batch.sequences > 1:
        columns += width.query  # the kernel's own output, whose rows are in another order
    tables = 4 * batch.length * model.head_dim * size
    return tokens * size * columns + tables + statistics


def head_memory(hidden_size: int, shard_rows: int, responses: int, form: TrainingForm) -> int:
    """Returns the largest sum of what the head keeps and works with in its backward pass, bytes.

    ``shard_rows`` is the vocabulary of this rank. ``textbook`` is log_softmax through autograd on whole logits: the
    log-probabilities, their exponentials and three gradients of that size at once.
    """
    size = form.dtype_bytes
    rows = responses * hidden_size * size  # the selected hidden rows; their gradient has as many bytes
    logits = responses * shard_rows
    weight_gradient = shard_rows * hidden_size * size
    if form.head == "textbook":
        cast = logits * size if size != _FP32 else 0
        return rows + max(5 * logits * _FP32 + cast, logits * size + rows + weight_gradient)
    chunk = chunk_rows(shard_rows, responses, form.chunk_bytes) * shard_rows
    if form.head == "logits":
        buffers = 2 * chunk * _FP32 if form.on_cpu else 0
        return rows + logits * size + max(buffers, rows + weight_gradient)
    buffers = chunk * size if size != _FP32 or not form.on_cpu else 0
    buffers += 2 * chunk * _FP32 if form.on_cpu else 0
    if size != _FP32:
        buffers += min(WEIGHT_BLOCK, shard_rows) * hidden_size * _FP32
    return 2 * rows + max(buffers, weight_gradient)


def chunk_rows(shard_rows: int, responses: int, chunk_bytes: int, itemsize: int = _FP32) -> int:
    """Returns the tokens of one chunk of logits: ``chunk_bytes`` of them, at most 1/16 of ``responses``, at least 1."""
    return max(1, min(chunk_bytes // (max(1, shard_rows) * itemsize), responses // 16))


def constant_memory(
    model: ModelSizes, layout: Layout, *, stage: int, vocab_rows: int, dtype_bytes: int
) -> tuple[int, int, int]:
    """Returns the bytes of one rank's weights, fp32 gradients and share of AdamW's state."""
    held = rank_parameters(model, layout, stage=stage, vocab_rows=vocab_rows)
    # two moments, and main weights beside half-precision ones
    state = 2 * _FP32 + (0 if dtype_bytes == _FP32 else _FP32)
    optimizer = state * held.dense // layout.num_replicas + state * held.experts * layout.ep // layout.num_replicas
    return held.total * dtype_bytes, held.total * _FP32, optimizer


def stage_memory(
    model: ModelSizes, layout: Layout, batch: BatchShape, form: TrainingForm, *, stage: int, num_micro_batches: int
) -> StageMemory:
    """Returns the memory of one rank of pipeline stage ``stage`` (from 0) at the peak of an update.

    The one-forward-one-backward schedule keeps ``pp - stage`` micro-batches waiting on a stage, fewer where there are
    fewer; the interleaved one 2 (pp - stage - 1) + (vpp - 1) pp + 1 of its chunks (Narayanan et al. 2021). Context
    parallelism cuts the micro-batch's length. ``activations`` is what waits, ``head`` and ``working`` what the worst
    moment of the backward pass adds.
    """
    batch = replace(batch, length=-(-batch.length // layout.cp), responses=-(-batch.responses // layout.cp))
    size, shards = form.dtype_bytes, layout.sequence_shards
    last = stage == layout.pp - 1
    # constant: weights, gradients, optimizer
    weights, gradients, optimizer = constant_memory(
        model, layout, stage=stage, vocab_rows=form.vocab_rows, dtype_bytes=size
    )
    # kept by a forward pass of one micro-batch, and made again in its backward pass
    layer = layer_activations(model, layout, batch, form)
    per_stage = model.num_layers // layout.pp
    row = batch.tokens * model.hidden_size * size
    if layout.recompute == "full":
        kept, redone = per_stage * row // shards, layer.total
    else:
        kept, redone = per_stage * layer.total, 0
        if layout.recompute == "selective" and form.attention == "local":
            redone = _core_attention(model, layout, batch, form)
    # forward passes that wait for their backward pass
    in_flight = layout.pp - stage
    if layout.vpp > 1:
        in_flight = 2 * (layout.pp - stage - 1) + (layout.vpp - 1) * layout.pp + 1
    chunks = min(in_flight, num_micro_batches * layout.vpp)
    waiting = kept * chunks // layout.vpp + 2 * batch.tokens * 8
    # the head of the last stage, with its final norm and the loss's own vectors
    head = 0
    if last:
        head = (2 if form.attention == "local" else 1) * row // shards + 16 * batch.responses * _FP32
        head += head_memory(model.hidden_size, form.vocab_rows // layout.tp, batch.responses, form)
    # the backward pass of a layer, beside the head's gradient where that waits for the embedding's
    matrix = form.vocab_rows // layout.tp * model.hidden_size * size
    backward = redone + _layer_working(model, layout, batch, form)
    if model.tied_embeddings and layout.pp == 1:
        backward += matrix
    # the embedding's gradient comes last; on a CPU, gloo then reduces a copy of the whole gradient buffer
    later = (2 if model.tied_embeddings else 1) * matrix if stage == 0 else 0
    if form.on_cpu:
        later = max(later, gradients)
    return StageMemory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=waiting,
        head=head,
        working=max(0, backward - head, later - waiting - head),
    )


def _core_attention(model: ModelSizes, layout: Layout, batch: BatchShape, form: TrainingForm) -> int:
    """Returns what selective recomputation brings back for the layer at hand."""
    whole, part = replace(layout, recompute="none"), replace(layout, recompute="selective")
    return layer_activations(model, whole, batch, form).total - layer_activations(model, part, batch, form).total


def _layer_working(model: ModelSizes, layout: Layout, batch: BatchShape, form: TrainingForm) -> int:
    """Returns what the backward pass of one layer adds at its worst moment to what all layers keep.

    That is in the MLP: the residual's gradient, then two F gradients more than are freed, or F and a weight's gradient.
    """
    width, size = _widths(model, layout), form.dtype_bytes
    row = batch.tokens * width.hidden * size // layout.sequence_shards
    gathered = batch.tokens * width.hidden * size if layout.sequence_parallel else 0
    ffn = batch.tokens * width.ffn * size
    weight = width.ffn * width.hidden * size
    return row + gathered + max(2 * ffn, ffn + weight)


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """Bytes of the embedded engine on one rank."""

    weights: int  # constant
    rollout: int  # KV cache, prefill and sampling buffers
    sync: int  # second copy of the weights, gathered buckets


def peak_bytes(training: StageMemory, engine: EngineMemory) -> int:
    """Returns constant memory and the largest of what update, rollout and weight sync add, which do not overlap."""
    return training.constant + engine.weights + max(training.transient, engine.rollout, engine.sync)


def kv_bytes_per_token(model: ModelSizes, dtype_bytes: int) -> int:
    """Returns the KV cache of one token over all layers of the whole model."""
    return 2 * model.num_layers * kv_width(model) * dtype_bytes


def embedded_engine_memory(
    model: ModelSizes, *, dtype_bytes: int, batch: int, prompts: int, prompt_tokens: int, length: int, bucket_bytes: int
) -> EngineMemory:
    """Returns the memory of the whole model that every rank holds for generation in its own process.

    ``batch`` sequences of at most ``length`` tokens decode together, of ``prompts`` different prompts. A layer's cache
    grows by copying, so one layer exists twice. The sampler works on four float32 vectors of the vocabulary.
    """
    cache = batch * length * kv_bytes_per_token(model, dtype_bytes)
    growth = cache // model.num_layers
    widest = 2 * query_width(model) + 3 * model.ffn_hidden_size + 2 * model.hidden_size
    prefill = prompts * prompt_tokens * (widest + prompt_tokens) * dtype_bytes
    sampling = 4 * batch * model.vocab_size * _FP32
    weights = parameter_count(model) * dtype_bytes
    return EngineMemory(
        weights=weights, rollout=cache + growth + max(prefill, sampling), sync=weights + 2 * bucket_bytes
    )

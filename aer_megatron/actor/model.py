"""The policy as a Megatron-Core GPTModel that returns log-probabilities and entropies instead of logits.

    tokens [b, S] -> decoder -> hidden [S, b, H] -> rows that carry loss [t, H] -> head -> (logprob_t, token_entropy_t)

Only rows of sampled tokens enter the language-model head. Shape suffixes: b sequences of a micro-batch, S padded
length, t sampled tokens, H hidden size, W vocabulary shard.

This file does NOT know losses, optimizers or files. Version differences of Megatron-Core are absorbed here.
"""

from __future__ import annotations

import dataclasses
import enum
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from aer_megatron.actor.fp8_emulation import attach_delayed_scaling, emulated_block, fp8_settings
from aer_megatron.actor.layers import (
    check_fp8,
    decoder_spec,
    describe_kernels,
    has_fused_weight_gradients,
    has_transformer_engine,
)
from aer_megatron.convert.architecture import ModelArchitecture, MoeArchitecture, padded_vocab_size
from aer_megatron.convert.mapping import renumber_expert, tp_axis
from aer_megatron.parallel.fused_head import fused_linear_logprob_entropy
from aer_megatron.parallel.topology import Topology
from aer_megatron.parallel.vocab import vocab_parallel_logprob_entropy

_LOG = logging.getLogger(__name__)
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True, slots=True)
class ModelOptions:
    """What the run file says of a model; parallel sizes are the topology's. The defaults are a plain fp32 model's."""

    dtype: Literal["fp32", "bf16"] = "fp32"
    sequence_parallel: bool = False
    vocab_multiple: int = 1  # each rank's vocabulary shard is padded to a multiple of it
    megatron: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # fields of TransformerConfig that win
    head: Literal["fused", "logits"] = "fused"  # this and the rest: of the policy's head alone
    temperature: float = 1.0
    score_statistics: bool = False  # forward-only passes also return the geometry of the two gradients


@dataclasses.dataclass(frozen=True, slots=True)
class HeadOptions:
    """How the head turns hidden rows into log-probabilities and entropies."""

    form: Literal["fused", "logits"]
    vocab_size: int  # real ids; padded rows beyond it never count
    temperature: float
    tp_group: Any  # None: the head is whole
    score_statistics: bool  # forward-only passes also return the geometry of the two gradients


class PolicyModel(GPTModel):  # type: ignore[misc]
    """GPTModel whose last stage returns float32 [2, t]: log-probability and exact entropy (nats) of each label.

    Without gradients and with ``head.score_statistics`` three rows follow: squared norms of the gradients of the
    log-probability and of the entropy in x = logits / T, and their dot product.

    ``labels`` is int64 [t]; ``loss_mask`` carries the int64 [t] flat positions b * S + s of the rows to score (the
    arguments keep GPTModel's names because Megatron's wrappers forward them by name).
    """

    def __init__(self, *, head: HeadOptions, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.head = head

    def _postprocess(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        if not self.post_process:
            return hidden_states
        hidden_tH = self._select_rows(hidden_states, kwargs["loss_mask"])
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        weight_WH = self.output_layer.weight if weight is None else weight
        head = self.head
        with_statistics = head.score_statistics and not torch.is_grad_enabled()
        options = {
            "tp_group": head.tp_group,
            "vocab_size": head.vocab_size,
            "temperature": head.temperature,
            "with_statistics": with_statistics,
        }
        if head.form == "fused":
            scores = fused_linear_logprob_entropy(hidden_tH, weight_WH, kwargs["labels"], **options)
        else:
            scores = vocab_parallel_logprob_entropy(self._logits(hidden_tH, weight_WH), kwargs["labels"], **options)
        rows = [scores.logprob_T, scores.entropy_T]
        if with_statistics:
            geometry = (scores.logprob_grad_sq_T, scores.entropy_grad_sq_T, scores.grad_dot_T)
            rows += [row for row in geometry if row is not None]
        return torch.stack(rows)

    def _select_rows(self, hidden_SbH: Tensor, row_t: Tensor) -> Tensor:
        if self.config.sequence_parallel:
            # the head's backward adds d_hidden over the ranks, so this backward must only split
            hidden_SbH = gather_from_sequence_parallel_region(hidden_SbH, tensor_parallel_output_grad=False)
        length, num_sequences, width = hidden_SbH.shape
        place_t = (row_t % length) * num_sequences + row_t // length
        return hidden_SbH.reshape(-1, width).index_select(0, place_t)

    def _logits(self, hidden_tH: Tensor, weight_WH: Tensor) -> Tensor:
        return linear_with_grad_accumulation_and_async_allreduce(
            input=hidden_tH,
            weight=weight_WH,
            bias=None,
            gradient_accumulation_fusion=self.config.gradient_accumulation_fusion,
            allreduce_dgrad=self.head.tp_group is not None,
            sequence_parallel=False,
            tp_group=self.head.tp_group,
        )


def transformer_config(arch: ModelArchitecture, options: ModelOptions, topology: Topology) -> TransformerConfig:
    """Returns Megatron's configuration of the architecture; ``[megatron]`` entries of the run file win.

    Raises:
        ValueError: a ``[megatron]`` key that TransformerConfig does not have, or one that is decided elsewhere.
    """
    dtype = TORCH_DTYPES[options.dtype]
    fields: dict[str, Any] = {
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.ffn_hidden_size,
        "num_attention_heads": arch.padded_heads,
        "num_query_groups": arch.padded_kv_heads,
        "kv_channels": arch.head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": arch.norm_eps,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": arch.qkv_bias,
        "qk_layernorm": arch.qk_norm,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": has_fused_weight_gradients(),
        "persist_layer_norm": False,
        "tensor_model_parallel_size": topology.tp,
        "pipeline_model_parallel_size": topology.pp,
        "virtual_pipeline_model_parallel_size": topology.vpp if topology.vpp > 1 else None,
        "context_parallel_size": topology.cp,
        "sequence_parallel": options.sequence_parallel,
        "pipeline_dtype": dtype,
        "params_dtype": dtype,
        "bf16": options.dtype == "bf16",
        "autocast_dtype": dtype,
        "perform_initialization": False,  # weights always come from a checkpoint
        # an interleaved pipeline between two stages needs its sends and receives one by one
        "overlap_p2p_comm": topology.vpp > 1,
        "batch_p2p_comm": topology.vpp == 1,
        "variable_seq_lengths": topology.pp > 1 and topology.vpp == 1,
        "moe_token_dispatcher_type": "alltoall",  # the one that takes variable lengths
        "calculate_per_token_loss": True,  # the loss carries the global normaliser already: nothing divides it again
    }
    if arch.moe:
        fields |= _moe_fields(arch.moe, options, topology)
    fields |= _checked_passthrough(options.megatron, fields)
    # Megatron-Core must not see emulated FP8: its checks and its recomputation then ask for TransformerEngine
    emulated = None if has_transformer_engine() else fields.pop("fp8", None)
    megatron_config = TransformerConfig(**fields)
    megatron_config.fp8_emulation = fp8_settings(emulated, megatron_config) if emulated else None
    return megatron_config


def _moe_fields(moe: MoeArchitecture, options: ModelOptions, topology: Topology) -> dict[str, Any]:
    if topology.tp > 1 and not options.sequence_parallel:
        raise ValueError(
            f"parallel.tp={topology.tp} with experts needs parallel.sequence_parallel=true: Megatron-Core trains "
            "expert layers under tensor parallelism only with it"
        )
    return {
        "num_moe_experts": moe.num_experts,
        "expert_model_parallel_size": topology.ep,
        "moe_router_topk": moe.top_k,
        "moe_ffn_hidden_size": moe.ffn_hidden_size,
        # rescaling the chosen probabilities to sum to 1 is a softmax over the chosen logits
        "moe_router_pre_softmax": not moe.norm_topk_prob,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_grouped_gemm": has_transformer_engine(),
    }


def _checked_passthrough(table: Mapping[str, Any], decided: Mapping[str, Any]) -> dict[str, Any]:
    check_fp8(table)
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    fixed = {"num_layers", "hidden_size", "tensor_model_parallel_size", "pipeline_model_parallel_size",
             "virtual_pipeline_model_parallel_size", "context_parallel_size", "sequence_parallel", "params_dtype",
             "bf16", "calculate_per_token_loss"}  # fmt: skip
    for key in table:
        if key not in known:
            raise ValueError(f"megatron.{key}: TransformerConfig of this Megatron-Core has no such field; remove it")
        if key in fixed:
            raise ValueError(
                f"megatron.{key}={table[key]!r} is decided elsewhere ({decided[key]!r} from the model's config.json, "
                "[model] or [parallel]); set it there"
            )
        ignored = key == "fp4" or (key == "fp8" and torch.cuda.is_available())
        if ignored and table[key] and not has_transformer_engine():
            raise ValueError(
                f"megatron.{key}={table[key]!r} needs TransformerEngine's layers: without them Megatron-Core ignores "
                "it without a word, so it is refused here (FP8 is emulated only where there is no CUDA device)"
            )
    return {key: _as_enumeration(key, value) for key, value in table.items()}


def _as_enumeration(key: str, value: Any) -> Any:
    """Returns a run file's value; Megatron-Core compares enumerations with members and ignores their names."""
    default = getattr(TransformerConfig, key, None)
    if not (isinstance(default, enum.Enum) and isinstance(value, str)):
        return value
    members = type(default).__members__
    if value not in members:
        raise ValueError(f"megatron.{key}={value!r} is unknown; use one of {', '.join(members)}")
    return members[value]


def build_chunks(arch: ModelArchitecture, options: ModelOptions, topology: Topology) -> list[PolicyModel]:
    """Returns this rank's model chunks, one where ``parallel.vpp`` is 1, without meaningful weights.

    Chunks share one configuration object: Megatron's schedules read the first one's.
    """
    head = HeadOptions(
        form=options.head,
        vocab_size=arch.vocab_size,
        temperature=options.temperature,
        tp_group=topology.tp_group,
        score_statistics=options.score_statistics,
    )
    megatron_config = transformer_config(arch, options, topology)
    chunks = [
        PolicyModel(head=head, **gpt_arguments(arch, options, topology, chunk, megatron_config))
        for chunk in range(topology.vpp)
    ]
    for model in chunks:
        _mark_tensor_parallel(model, arch)
        attach_delayed_scaling(model.decoder)
    if topology.rank == 0 and megatron_config.fp8_emulation:
        _LOG.warning("%s", megatron_config.fp8_emulation.describe())
    elif topology.rank == 0 and torch.cuda.is_available():
        _LOG.warning("%s", describe_kernels(megatron_config))
    return chunks


def _layer_spec(
    config: TransformerConfig, arch: ModelArchitecture, num_layers: int, place: tuple[int | None, int]
) -> Any:
    """Returns the layers of the chunk at ``place``, (virtual stage, stage): emulated ones where FP8 is emulated."""
    spec, fp8 = decoder_spec(config, arch, num_layers), config.fp8_emulation
    if fp8 is None:
        return spec
    first = get_transformer_layer_offset(config, *place)
    return emulated_block(spec, fp8, first_layer=first, num_layers=arch.num_layers)


def gpt_arguments(
    arch: ModelArchitecture,
    options: ModelOptions,
    topology: Topology,
    chunk: int = 0,
    megatron_config: TransformerConfig | None = None,
) -> dict[str, Any]:
    """Returns the arguments of Megatron's GPTModel for chunk ``chunk`` of this rank's pipeline stage."""
    megatron_config = megatron_config or transformer_config(arch, options, topology)
    vp_stage = chunk if topology.vpp > 1 else None
    num_layers = get_num_layers_to_build(megatron_config, vp_stage=vp_stage, pp_rank=topology.pp_rank)
    return {
        "config": megatron_config,
        "transformer_layer_spec": _layer_spec(megatron_config, arch, num_layers, (vp_stage, topology.pp_rank)),
        "vocab_size": padded_vocab_size(arch.vocab_size, topology.tp, divisible_by=options.vocab_multiple),
        "max_sequence_length": arch.max_positions,
        "pre_process": topology.is_first_stage and chunk == 0,
        "post_process": topology.is_last_stage and chunk == topology.vpp - 1,
        "share_embeddings_and_output_weights": arch.tied_embeddings,
        "position_embedding_type": "rope",
        "rotary_base": arch.rope_theta,
        "vp_stage": vp_stage,
        **_rope_scaling(arch),
    }


def named_weights(model: GPTModel | Sequence[GPTModel]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yields (name with global layer and expert numbers, parameter) of a model or of a rank's chunks."""
    for chunk in [model] if isinstance(model, GPTModel) else model:
        for name, parameter in chunk.named_parameters():
            yield global_name(chunk, name), parameter


def global_name(model: GPTModel, name: str) -> str:
    """Returns the parameter's name with its local layer and expert numbers replaced by the global ones."""
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        layer = model.decoder.layers[int(parts[2])]
        parts[2] = str(layer.layer_number - 1)
        if parts[3:5] == ["mlp", "experts"]:
            return renumber_expert(".".join(parts), layer.mlp.local_expert_indices[0])
    return ".".join(parts)


def _mark_tensor_parallel(model: PolicyModel, arch: ModelArchitecture) -> None:
    """Marks split parameters as Megatron's initialisation would have done.

    Without initialisation Megatron-Core leaves the marks out, and its gradient norm then takes every shard but the
    first rank's for a duplicate and drops it.
    """
    for name, parameter in model.named_parameters():
        axis = tp_axis(arch, global_name(model, name))
        parameter.tensor_model_parallel = axis is not None
        parameter.partition_dim = -1 if axis is None else axis
        parameter.partition_stride = 1


def _rope_scaling(arch: ModelArchitecture) -> dict[str, Any]:
    scaling = arch.rope_scaling
    if scaling is None:
        return {}
    if scaling["rope_type"] == "llama3":  # its other constants are checked where config.json is read
        return {"rope_scaling": True, "rope_scaling_factor": scaling["factor"]}
    raise ValueError(f"rope_scaling={dict(scaling)} of config.json is not supported; supported: none, llama3")

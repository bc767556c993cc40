"""The parameter tables: one row per Megatron-Core parameter, read in both directions.

A row says under which name(s) Hugging Face keeps the same numbers, how the two layouts differ (``kind``) and
along which axis tensor parallelism splits the Megatron side. convert/mapping.py turns rows into tensor
functions; nothing else in the project spells these names.

Placeholders: ``{i}`` is the layer and ``{e}`` the expert, both GLOBAL indices (a pipeline stage or an
expert-parallel rank counts from zero in its own module names: the caller translates).

HF shapes are written in named dimensions, resolved by ``ModelArchitecture.dim``: hidden, q (heads *
head_dim), kv (kv_heads * head_dim), head_dim, ffn, moe_ffn, experts, vocab.

This file does NOT hold tensors or code that touches them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Literal

Kind = Literal["copy", "vocab", "qkv", "attention_out", "gate_up"]
Stage = Literal["first", "layer", "last"]


@dataclass(frozen=True)
class HFTensor:
    """One tensor of the Hugging Face checkpoint. Example: ``HFTensor("lm_head.weight", "vocab hidden")``"""

    name: str
    dims: str


@dataclass(frozen=True)
class Row:
    """One Megatron parameter and its Hugging Face tensors.

    kind: copy = same layout; vocab = rows padded to the tensor-parallel size; qkv = interleaved per query
    group; attention_out = columns follow the (possibly padded) query heads; gate_up = [gate; up] per shard.
    tp_axis: the axis split over tensor parallelism, None = the same on every rank. te: the name under
    TransformerEngine's layer spec, where it differs. stored: the key(s) in Megatron's distributed checkpoint,
    where they do not follow from the names. when_tied: read instead when the embeddings are tied; such a row
    is then never written back.
    """

    megatron: str
    hf: tuple[HFTensor, ...]
    kind: Kind
    tp_axis: int | None
    stage: Stage = "layer"
    te: str | None = None
    when_tied: HFTensor | None = None
    stored: tuple[str, ...] = ()

    @property
    def stored_keys(self) -> tuple[str, ...]:
        """The keys of a distributed checkpoint, any of which holds all layers (and experts) of this row.

        Megatron-Core stacks layers along a first axis and gives both layer specs TransformerEngine's names.
        """
        return self.stored or ((self.te or self.megatron).replace("{i}.", ""),)

    @cached_property
    def patterns(self) -> tuple[re.Pattern[str], ...]:
        """The name patterns that select this row: the local spec's, then TransformerEngine's."""
        names = [self.megatron] + ([self.te] if self.te else [])
        return tuple(_pattern(name) for name in names)


@dataclass(frozen=True)
class Family:
    """What one Hugging Face architecture needs beyond the numbers of its config.json."""

    name: str
    hf_architecture: str
    rows: tuple[Row, ...]
    qk_norm: bool = False
    qkv_bias: bool = False
    moe: bool = False
    default_head_dim: int | None = None  # where config.json may omit it; None = hidden_size / heads


def _pattern(template: str) -> re.Pattern[str]:
    escaped = re.escape(template)
    for placeholder in ("i", "e"):
        escaped = escaped.replace(re.escape(f"{{{placeholder}}}"), rf"(?P<{placeholder}>\d+)")
    return re.compile(escaped)


_M = "decoder.layers.{i}."
_H = "model.layers.{i}."
_EMBEDDING = HFTensor("model.embed_tokens.weight", "vocab hidden")

_ENDS = (
    Row("embedding.word_embeddings.weight", (_EMBEDDING,), "vocab", 0, stage="first"),
    Row(
        "decoder.final_layernorm.weight",
        (HFTensor("model.norm.weight", "hidden"),),
        "copy",
        None,
        stage="last",
    ),
    Row(
        "output_layer.weight",
        (HFTensor("lm_head.weight", "vocab hidden"),),
        "vocab",
        0,
        stage="last",
        when_tied=_EMBEDDING,
    ),
)

_ATTENTION = (
    Row(
        _M + "input_layernorm.weight",
        (HFTensor(_H + "input_layernorm.weight", "hidden"),),
        "copy",
        None,
        te=_M + "self_attention.linear_qkv.layer_norm_weight",
    ),
    Row(
        _M + "self_attention.linear_qkv.weight",
        (
            HFTensor(_H + "self_attn.q_proj.weight", "q hidden"),
            HFTensor(_H + "self_attn.k_proj.weight", "kv hidden"),
            HFTensor(_H + "self_attn.v_proj.weight", "kv hidden"),
        ),
        "qkv",
        0,
    ),
    Row(
        _M + "self_attention.linear_proj.weight",
        (HFTensor(_H + "self_attn.o_proj.weight", "hidden q"),),
        "attention_out",
        1,
    ),
)

_QKV_BIAS = (
    Row(
        _M + "self_attention.linear_qkv.bias",
        (
            HFTensor(_H + "self_attn.q_proj.bias", "q"),
            HFTensor(_H + "self_attn.k_proj.bias", "kv"),
            HFTensor(_H + "self_attn.v_proj.bias", "kv"),
        ),
        "qkv",
        0,
    ),
)

_QK_NORM = (
    Row(
        _M + "self_attention.q_layernorm.weight",
        (HFTensor(_H + "self_attn.q_norm.weight", "head_dim"),),
        "copy",
        None,
    ),
    Row(
        _M + "self_attention.k_layernorm.weight",
        (HFTensor(_H + "self_attn.k_norm.weight", "head_dim"),),
        "copy",
        None,
    ),
)

_DENSE_MLP = (
    Row(
        _M + "pre_mlp_layernorm.weight",
        (HFTensor(_H + "post_attention_layernorm.weight", "hidden"),),
        "copy",
        None,
        te=_M + "mlp.linear_fc1.layer_norm_weight",
    ),
    Row(
        _M + "mlp.linear_fc1.weight",
        (
            HFTensor(_H + "mlp.gate_proj.weight", "ffn hidden"),
            HFTensor(_H + "mlp.up_proj.weight", "ffn hidden"),
        ),
        "gate_up",
        0,
    ),
    Row(_M + "mlp.linear_fc2.weight", (HFTensor(_H + "mlp.down_proj.weight", "hidden ffn"),), "copy", 1),
)

# The norm before experts is a module of its own under both specs: tokens are dispatched after it. In a
# distributed checkpoint the local spec nevertheless calls it as if it were fused.
_MOE_MLP = (
    Row(
        _M + "pre_mlp_layernorm.weight",
        (HFTensor(_H + "post_attention_layernorm.weight", "hidden"),),
        "copy",
        None,
        stored=("decoder.layers.pre_mlp_layernorm.weight", "decoder.layers.mlp.linear_fc1.layer_norm_weight"),
    ),
    Row(_M + "mlp.router.weight", (HFTensor(_H + "mlp.gate.weight", "experts hidden"),), "copy", None),
    Row(
        _M + "mlp.experts.local_experts.{e}.linear_fc1.weight",
        (
            HFTensor(_H + "mlp.experts.{e}.gate_proj.weight", "moe_ffn hidden"),
            HFTensor(_H + "mlp.experts.{e}.up_proj.weight", "moe_ffn hidden"),
        ),
        "gate_up",
        0,
        te=_M + "mlp.experts.linear_fc1.weight{e}",
        stored=("decoder.layers.mlp.experts.experts.linear_fc1.weight",),
    ),
    Row(
        _M + "mlp.experts.local_experts.{e}.linear_fc2.weight",
        (HFTensor(_H + "mlp.experts.{e}.down_proj.weight", "hidden moe_ffn"),),
        "copy",
        1,
        te=_M + "mlp.experts.linear_fc2.weight{e}",
        stored=("decoder.layers.mlp.experts.experts.linear_fc2.weight",),
    ),
)

_LLAMA_ROWS = _ENDS + _ATTENTION + _DENSE_MLP

_ALL = (
    # Qwen3Config's own default head_dim is 128 whatever the hidden size is.
    Family("qwen3", "Qwen3ForCausalLM", _LLAMA_ROWS + _QK_NORM, qk_norm=True, default_head_dim=128),
    Family("qwen3_moe", "Qwen3MoeForCausalLM", _ENDS + _ATTENTION + _QK_NORM + _MOE_MLP, qk_norm=True, moe=True),
    Family("qwen2", "Qwen2ForCausalLM", _LLAMA_ROWS + _QKV_BIAS, qkv_bias=True),
    Family("llama", "LlamaForCausalLM", _LLAMA_ROWS),
    Family("mistral", "MistralForCausalLM", _LLAMA_ROWS),
)

# Modules that Megatron-Core gives an (empty) extra state in distributed checkpoints, per layer and per expert.
EXTRA_STATES = ("self_attention.linear_qkv", "self_attention.linear_proj", "self_attention.core_attention")
EXTRA_STATES_DENSE = ("mlp.linear_fc1", "mlp.linear_fc2")
EXTRA_STATES_EXPERT = ("mlp.experts.experts.linear_fc1", "mlp.experts.experts.linear_fc2")

FAMILIES: Mapping[str, Family] = MappingProxyType({family.name: family for family in _ALL})

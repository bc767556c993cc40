"""The parameter tables: which Megatron-Core parameters a model has, one row each, read in both directions.

A row (convert/rows.py) says under which name(s) Hugging Face keeps the same numbers; its class how they are arranged,
``tp_axis`` along which axis tensor parallelism splits the Megatron side. convert/mapping.py looks rows up by name;
nothing else in the project spells these names. A new model family is a line of ``_ALL`` below, with rows of its own
where it has other parameters than Llama.

Placeholders: ``{i}`` is the layer and ``{e}`` the expert, both GLOBAL indices (a pipeline stage or an
expert-parallel rank counts from zero in its own module names: the caller translates).

HF shapes are written in named dimensions, resolved by ``ModelArchitecture.dim``: hidden, q (heads *
head_dim), kv (kv_heads * head_dim), head_dim, ffn, moe_ffn, experts, vocab.

This file does NOT hold tensors or code that touches them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from aer_megatron.convert.rows import AttentionOutputRow, GateUpRow, HFTensor, QKVRow, Row, VocabularyRow


@dataclass(frozen=True)
class ModelFamily:
    """What one Hugging Face architecture needs beyond the numbers of its config.json.

    sliding_window_without_switch: a ``sliding_window`` of config.json applies whenever it is set, not only under
    ``use_sliding_window``. default_head_dim: where config.json may omit it; None = hidden_size / heads.
    """

    name: str
    hf_architecture: str
    rows: tuple[Row, ...]
    qk_norm: bool = False
    qkv_bias: bool = False
    moe: bool = False
    default_head_dim: int | None = None
    sliding_window_without_switch: bool = False


_M = "decoder.layers.{i}."
_H = "model.layers.{i}."
_EMBEDDING = HFTensor("model.embed_tokens.weight", "vocab hidden")

_ENDS = (
    VocabularyRow("embedding.word_embeddings.weight", (_EMBEDDING,), stage="first"),
    Row("decoder.final_layernorm.weight", (HFTensor("model.norm.weight", "hidden"),), stage="last"),
    VocabularyRow(
        "output_layer.weight", (HFTensor("lm_head.weight", "vocab hidden"),), stage="last", when_tied=_EMBEDDING
    ),
)

_ATTENTION = (
    Row(
        _M + "input_layernorm.weight",
        (HFTensor(_H + "input_layernorm.weight", "hidden"),),
        te=_M + "self_attention.linear_qkv.layer_norm_weight",
    ),
    QKVRow(
        _M + "self_attention.linear_qkv.weight",
        (
            HFTensor(_H + "self_attn.q_proj.weight", "q hidden"),
            HFTensor(_H + "self_attn.k_proj.weight", "kv hidden"),
            HFTensor(_H + "self_attn.v_proj.weight", "kv hidden"),
        ),
    ),
    AttentionOutputRow(
        _M + "self_attention.linear_proj.weight", (HFTensor(_H + "self_attn.o_proj.weight", "hidden q"),)
    ),
)

_QKV_BIAS = (
    QKVRow(
        _M + "self_attention.linear_qkv.bias",
        (
            HFTensor(_H + "self_attn.q_proj.bias", "q"),
            HFTensor(_H + "self_attn.k_proj.bias", "kv"),
            HFTensor(_H + "self_attn.v_proj.bias", "kv"),
        ),
    ),
)

_QK_NORM = (
    Row(_M + "self_attention.q_layernorm.weight", (HFTensor(_H + "self_attn.q_norm.weight", "head_dim"),)),
    Row(_M + "self_attention.k_layernorm.weight", (HFTensor(_H + "self_attn.k_norm.weight", "head_dim"),)),
)

_DENSE_MLP = (
    Row(
        _M + "pre_mlp_layernorm.weight",
        (HFTensor(_H + "post_attention_layernorm.weight", "hidden"),),
        te=_M + "mlp.linear_fc1.layer_norm_weight",
    ),
    GateUpRow(
        _M + "mlp.linear_fc1.weight",
        (
            HFTensor(_H + "mlp.gate_proj.weight", "ffn hidden"),
            HFTensor(_H + "mlp.up_proj.weight", "ffn hidden"),
        ),
    ),
    Row(_M + "mlp.linear_fc2.weight", (HFTensor(_H + "mlp.down_proj.weight", "hidden ffn"),), tp_axis=1),
)

# The norm before experts is a module of its own under both specs: tokens are dispatched after it. In a
# distributed checkpoint the local spec nevertheless calls it as if it were fused.
_MOE_MLP = (
    Row(
        _M + "pre_mlp_layernorm.weight",
        (HFTensor(_H + "post_attention_layernorm.weight", "hidden"),),
        stored=("decoder.layers.pre_mlp_layernorm.weight", "decoder.layers.mlp.linear_fc1.layer_norm_weight"),
    ),
    Row(_M + "mlp.router.weight", (HFTensor(_H + "mlp.gate.weight", "experts hidden"),)),
    GateUpRow(
        _M + "mlp.experts.local_experts.{e}.linear_fc1.weight",
        (
            HFTensor(_H + "mlp.experts.{e}.gate_proj.weight", "moe_ffn hidden"),
            HFTensor(_H + "mlp.experts.{e}.up_proj.weight", "moe_ffn hidden"),
        ),
        te=_M + "mlp.experts.linear_fc1.weight{e}",
        stored=("decoder.layers.mlp.experts.experts.linear_fc1.weight",),
    ),
    Row(
        _M + "mlp.experts.local_experts.{e}.linear_fc2.weight",
        (HFTensor(_H + "mlp.experts.{e}.down_proj.weight", "hidden moe_ffn"),),
        tp_axis=1,
        te=_M + "mlp.experts.linear_fc2.weight{e}",
        stored=("decoder.layers.mlp.experts.experts.linear_fc2.weight",),
    ),
)

_LLAMA_ROWS = _ENDS + _ATTENTION + _DENSE_MLP

_ALL = (
    # Qwen3Config's own default head_dim is 128 whatever the hidden size is.
    ModelFamily("qwen3", "Qwen3ForCausalLM", _LLAMA_ROWS + _QK_NORM, qk_norm=True, default_head_dim=128),
    ModelFamily("qwen3_moe", "Qwen3MoeForCausalLM", _ENDS + _ATTENTION + _QK_NORM + _MOE_MLP, qk_norm=True, moe=True),
    ModelFamily("qwen2", "Qwen2ForCausalLM", _LLAMA_ROWS + _QKV_BIAS, qkv_bias=True),
    ModelFamily("llama", "LlamaForCausalLM", _LLAMA_ROWS),
    ModelFamily("mistral", "MistralForCausalLM", _LLAMA_ROWS, sliding_window_without_switch=True),
)

# Modules that Megatron-Core gives an (empty) extra state in distributed checkpoints, per layer and per expert.
EXTRA_STATES = ("self_attention.linear_qkv", "self_attention.linear_proj", "self_attention.core_attention")
EXTRA_STATES_DENSE = ("mlp.linear_fc1", "mlp.linear_fc2")
EXTRA_STATES_EXPERT = ("mlp.experts.experts.linear_fc1", "mlp.experts.experts.linear_fc2")

MODEL_FAMILIES: Mapping[str, ModelFamily] = MappingProxyType({family.name: family for family in _ALL})

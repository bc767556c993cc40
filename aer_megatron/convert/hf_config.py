"""A model's architecture, read from the content of a Hugging Face config.json.

A field that would change the mathematics and that the Megatron side cannot express is refused here, by name, rather
than ignored. This file does NOT open files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from aer_megatron.convert.architecture import ModelArchitecture, MoeArchitecture
from aer_megatron.convert.families import MODEL_FAMILIES, ModelFamily

_MOST_LAYERS = 1 << 16  # of layers and of experts: each is listed by name
# Megatron-Core's GPTModel takes the factor of Llama 3's scaling and fixes the rest to these.
_LLAMA3_FIXED = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def architecture_from_hf_config(config: Mapping[str, Any]) -> ModelArchitecture:
    """The architecture that a Hugging Face config.json describes.

    Absent keys take the family's own Hugging Face defaults where those change the model. Raises ValueError
    naming the architecture for an unknown one, and the field for one whose value the Megatron model cannot
    express.
    """
    family = _family(config)
    _refuse_unsupported(config, family)
    num_heads = _int(config, "num_attention_heads", family)
    absent = config.get("num_key_value_heads") is None
    num_kv_heads = num_heads if absent else _int(config, "num_key_value_heads", family)
    hidden_size = _int(config, "hidden_size", family)
    if num_heads % num_kv_heads:
        raise ValueError(f"config.json: num_key_value_heads={num_kv_heads} must divide num_attention_heads={num_heads}")
    rope_theta, rope_scaling = _rope(config)
    return ModelArchitecture(
        family=family.name,
        num_layers=_int(config, "num_hidden_layers", family, most=_MOST_LAYERS),
        hidden_size=hidden_size,
        ffn_hidden_size=_int(config, "intermediate_size", family),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_head_dim(config, family, hidden_size, num_heads),
        vocab_size=_int(config, "vocab_size", family),
        tied_embeddings=_flag(config, "tie_word_embeddings"),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        norm_eps=_positive(config, "rms_norm_eps", 1e-6, below=1.0),
        qk_norm=family.qk_norm,
        qkv_bias=family.qkv_bias,
        max_positions=_int(config, "max_position_embeddings", family),
        moe=_moe(config, family) if family.moe else None,
    )


def _family(config: Mapping[str, Any]) -> ModelFamily:
    named = config.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ValueError(f"config.json: architectures={_shown(named)} must be a list of names")
    for family in MODEL_FAMILIES.values():
        if named == [family.hf_architecture] or (not named and config.get("model_type") == family.name):
            return family
    what = ", ".join(named)[:200] if named else f"model_type={_shown(config.get('model_type'))}"
    supported = ", ".join(family.hf_architecture for family in MODEL_FAMILIES.values())
    raise ValueError(f"config.json: architecture {what} is not supported; supported: {supported}")


def _int(config: Mapping[str, Any], key: str, family: ModelFamily, *, most: int = 2**31 - 1) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ValueError(
            f"config.json ({family.hf_architecture}): {key}={_shown(value)} must be a positive integer, at most {most}"
        )
    return value


def _positive(table: Mapping[str, Any], key: str, default: float, *, below: float = math.inf) -> float:
    """The number ``key`` of a table, ``default`` where it is absent or null; above 0, finite and under a bound."""
    value = default if table.get(key) is None else table[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < min(below, 2.0**1023):
        rule = f"a number between 0 and {below:g}" if below < math.inf else "a finite number above 0"
        raise ValueError(f"config.json: {key}={_shown(value)} must be {rule}")
    return float(value)


def _flag(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"config.json: {key}={_shown(value)} must be true or false")
    return bool(value)


def _shown(value: Any) -> str:
    return repr(value)[:80]


def _head_dim(config: Mapping[str, Any], family: ModelFamily, hidden_size: int, num_heads: int) -> int:
    explicit = config.get("head_dim")
    if explicit is not None or family.default_head_dim:
        head_dim = family.default_head_dim if explicit is None else _int(config, "head_dim", family, most=2**16)
        return _even(int(head_dim or 0), "head_dim")
    if hidden_size % num_heads:
        raise ValueError(
            f"config.json: hidden_size={hidden_size} must be a multiple of num_attention_heads={num_heads}"
            " where head_dim is not given"
        )
    return _even(hidden_size // num_heads, "hidden_size / num_attention_heads")


def _even(head_dim: int, what: str) -> int:
    if head_dim % 2:
        raise ValueError(f"config.json: {what} = {head_dim} must be even: rotary embeddings turn pairs")
    return head_dim


def _moe(config: Mapping[str, Any], family: ModelFamily) -> MoeArchitecture:
    key = "num_experts" if "num_experts" in config else "num_local_experts"
    num_experts = _int(config, key, family, most=_MOST_LAYERS)
    return MoeArchitecture(
        num_experts=num_experts,
        top_k=_int(config, "num_experts_per_tok", family, most=num_experts),
        ffn_hidden_size=_int(config, "moe_intermediate_size", family),
        norm_topk_prob=_flag(config, "norm_topk_prob"),
    )


def _refuse_unsupported(config: Mapping[str, Any], family: ModelFamily) -> None:
    """Raises ValueError for a field that changes the model beyond the tables."""
    rules: list[tuple[str, bool, str]] = [
        ("hidden_act", config.get("hidden_act", "silu") == "silu", "only silu (SwiGLU)"),
        (
            "attention_bias",
            not config.get("attention_bias"),
            "only false: an output-projection bias has no row",
        ),
        ("mlp_bias", not config.get("mlp_bias"), "only false"),
        (
            "quantization_config",
            not config.get("quantization_config"),
            "only unquantized weights: dequantize the checkpoint first",
        ),
        (
            "sliding_window",
            not _slides(config, family),
            "only full attention: no window below max_position_embeddings",
        ),
        (
            "layer_types",
            _all_full(config.get("layer_types") or ["full_attention"]),
            "only full_attention",
        ),
    ]
    if family.moe:
        rules += [
            ("mlp_only_layers", not config.get("mlp_only_layers"), "only []: every layer has experts"),
            (
                "decoder_sparse_step",
                config.get("decoder_sparse_step", 1) == 1,
                "only 1: every layer has experts",
            ),
        ]
    for key, ok, rule in rules:
        if not ok:
            raise ValueError(
                f"config.json: {key}={_shown(config.get(key))} is not supported for {family.hf_architecture} ({rule})"
            )


def _all_full(layer_types: Any) -> bool:
    return isinstance(layer_types, list) and all(kind == "full_attention" for kind in layer_types)


def _slides(config: Mapping[str, Any], family: ModelFamily) -> bool:
    window = config.get("sliding_window", 4096)  # Hugging Face's default in every family that has the field
    enabled = _flag(config, "use_sliding_window") or family.sliding_window_without_switch
    if not enabled or window is None:
        return False
    longest = _int(config, "max_position_embeddings", family)
    return _int({"sliding_window": window}, "sliding_window", family) < longest


def _rope(config: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling or None), from rope_parameters (transformers 5) or rope_theta and rope_scaling."""
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        raise ValueError(f"config.json: rope_scaling or rope_parameters = {_shown(given)} must be an object or null")
    table = dict(given)
    if any(isinstance(value, Mapping) for value in table.values()):
        raise ValueError(
            f"config.json: rope_parameters={_shown(table)} is not supported (one table for all layers only)"
        )
    theta = _positive(table, "rope_theta", _positive(config, "rope_theta", 10000.0))
    table.pop("rope_theta", None)
    rope_type = table.pop("rope_type", None) or table.pop("type", None) or "default"
    table.pop("type", None)
    fraction = _positive(table, "partial_rotary_factor", _positive(config, "partial_rotary_factor", 1.0))
    table.pop("partial_rotary_factor", None)
    if fraction != 1.0:
        raise ValueError(f"config.json: partial_rotary_factor={fraction} is not supported (only 1.0)")
    if rope_type == "default":
        return theta, None
    if rope_type not in ("linear", "llama3"):
        raise ValueError(f"config.json: rope type {_shown(rope_type)} is not supported (only default, linear, llama3)")
    if "factor" not in table:
        raise ValueError(f"config.json: rope type {rope_type!r} needs a factor")
    _positive(table, "factor", 1.0)
    if rope_type == "llama3":
        for key, value in _LLAMA3_FIXED.items():
            if table.get(key) != value:
                raise ValueError(
                    f"config.json: rope scaling {key}={_shown(table.get(key))} is not supported"
                    f" (Megatron-Core fixes {value:g})"
                )
    return theta, {"rope_type": rope_type, **table}

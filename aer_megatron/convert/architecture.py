"""The shape of a language model, read from a Hugging Face config.json, and the parallel sizes it allows.

``ModelArchitecture`` is what convert/ and actor/ share: actor/model.py builds Megatron-Core's GPTModel from
it, convert/mapping.py reads tensor shapes from it. A field of config.json that would change the mathematics
and that the Megatron side cannot express is refused here, by name, rather than ignored.

This file does NOT read files and does NOT import torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from aer_megatron.convert.families import FAMILIES, Family

_MOST_LAYERS = 1 << 16  # of layers and of experts: each is listed by name
# Megatron-Core's GPTModel takes the factor of Llama 3's scaling and fixes the rest to these.
_LLAMA3_FIXED = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True, slots=True)
class MoeArchitecture:
    """The expert layers. Example: Qwen3-30B-A3B is ``MoeArchitecture(128, 8, 768, True)``"""

    num_experts: int
    top_k: int
    ffn_hidden_size: int
    norm_topk_prob: bool  # router probabilities of the chosen experts are rescaled to sum to 1


@dataclass(frozen=True, slots=True)
class ModelArchitecture:
    """Sizes and switches of one decoder-only transformer (RMSNorm, SwiGLU, RoPE, grouped-query attention).

    ``num_heads`` and ``num_kv_heads`` are the checkpoint's. ``num_padding_groups`` counts all-zero query
    groups (one KV head and its query heads) that the Megatron model carries beyond them, see
    ``pad_query_groups``; build the Megatron model from ``padded_heads`` and ``padded_kv_heads``.
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None  # Hugging Face's table, "rope_type" always present; None = plain RoPE
    norm_eps: float
    qk_norm: bool
    qkv_bias: bool
    max_positions: int
    moe: MoeArchitecture | None = None
    num_padding_groups: int = 0

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def padded_kv_heads(self) -> int:
        """KV heads (query groups) of the Megatron model."""
        return self.num_kv_heads + self.num_padding_groups

    @property
    def padded_heads(self) -> int:
        """Query heads of the Megatron model."""
        return self.padded_kv_heads * self.heads_per_group

    def dim(self, name: str) -> int:
        """The size of a named dimension of families.py's HF shapes. Raises KeyError for an unknown name."""
        sizes = {
            "hidden": self.hidden_size,
            "q": self.num_heads * self.head_dim,
            "kv": self.num_kv_heads * self.head_dim,
            "head_dim": self.head_dim,
            "ffn": self.ffn_hidden_size,
            "vocab": self.vocab_size,
        }
        if self.moe is not None:
            sizes |= {"experts": self.moe.num_experts, "moe_ffn": self.moe.ffn_hidden_size}
        return sizes[name]


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


def padded_vocab_size(vocab_size: int, tp: int, *, divisible_by: int) -> int:
    """The vocabulary rows of the Megatron model: the next multiple of ``tp * divisible_by``.

    Tensor parallelism needs a multiple of ``tp``. ``divisible_by`` also makes every rank's shard a multiple
    of itself: 128 (Megatron-LM's habit) keeps the logits GEMM on full tensor-core tiles, 1 adds the fewest
    rows and is right for tiny vocabularies. Rows from ``vocab_size`` on hold zeros and belong to no token:
    their logit is 0, not -inf, so a softmax over the padded width must mask them.
    """
    if vocab_size < 1 or tp < 1 or divisible_by < 1:
        raise ValueError(f"vocab_size={vocab_size}, tp={tp} and divisible_by={divisible_by} must each be at least 1")
    return math.ceil(vocab_size / (tp * divisible_by)) * tp * divisible_by


def pad_query_groups(arch: ModelArchitecture, tp: int) -> ModelArchitecture:
    """``arch`` with the fewest all-zero query groups that make its attention divisible by ``tp``.

    Exact, in training too: a padded group's q, k, v rows and output-projection columns are zero, so it adds
    zero to the output; its value and output gradients are products with one of those zeros, its query and key
    gradients follow the zero value, so gradients, their norm and Adam's updates of the group are exactly zero
    and no real weight notices. The price is ``padded_heads / num_heads`` times the attention work. Whole
    groups are padded because a zero query head inside a real group would attend to real values and receive a
    gradient.
    """
    groups = arch.num_kv_heads
    while not _heads_fit(arch, groups, tp):
        groups += 1
    return replace(arch, num_padding_groups=groups - arch.num_kv_heads)


def check_parallel(arch: ModelArchitecture, tp: int, pp: int, *, vpp: int = 1, ep: int = 1) -> None:
    """Returns nothing; raises ValueError unless ``arch``'s Megatron model splits tp x pp (x vpp, ep) ways.

    Fewer KV heads than ranks are supported by Megatron-Core (0.16.1 and later) where KV heads divide tp: the
    fused linear_qkv is cut into tp equal row blocks regardless of group borders and its activations are
    gathered, so KV weights are not replicated.
    """
    for option, value in (("tp", tp), ("pp", pp), ("vpp", vpp), ("ep", ep)):
        if value < 1:
            raise ValueError(f"parallel.{option}={value} must be at least 1; use 1 for no split")
    if not _heads_fit(arch, arch.padded_kv_heads, tp):
        padded = pad_query_groups(arch, tp)
        raise ValueError(
            f"parallel.tp={tp} does not fit {arch.padded_heads} attention heads in {arch.padded_kv_heads}"
            " groups: tp must divide the heads, and divide or be a multiple of the KV heads; use"
            f" {_fitting(arch, tp)}, or pad with zero heads (convert.architecture.pad_query_groups:"
            f" {padded.padded_heads} heads in {padded.padded_kv_heads} groups)"
        )
    ffn = arch.moe.ffn_hidden_size if arch.moe else arch.ffn_hidden_size
    if ffn % tp:
        raise ValueError(
            f"parallel.tp={tp} must divide the feed-forward width {ffn}; use {_divisors_text(ffn, 'tp', tp)}"
        )
    if arch.num_layers % (pp * vpp):
        what = f"pp * vpp = {pp} * {vpp}" if vpp > 1 else f"pp={pp}"
        raise ValueError(
            f"parallel.{what} must divide the model's {arch.num_layers} layers;"
            f" use {_divisors_text(arch.num_layers, 'pp * vpp' if vpp > 1 else 'pp', pp * vpp)}"
        )
    num_experts = arch.moe.num_experts if arch.moe else 1
    if num_experts % ep:
        raise ValueError(
            f"parallel.ep={ep} must divide the model's {num_experts} expert(s);"
            f" use {_divisors_text(num_experts, 'ep', ep)}"
        )


def _heads_fit(arch: ModelArchitecture, groups: int, tp: int) -> bool:
    whole_heads = groups * arch.heads_per_group % tp == 0
    whole_rows = groups * (arch.heads_per_group + 2) * arch.head_dim % tp == 0
    return whole_heads and whole_rows and (groups % tp == 0 or tp % groups == 0)


def _fitting(arch: ModelArchitecture, tp: int) -> str:
    sizes = [n for n in range(1, 2 * tp) if _heads_fit(arch, arch.padded_kv_heads, n)]
    return "tp=" + " or ".join(map(str, sizes[-3:]))


def _divisors_text(total: int, option: str, wanted: int) -> str:
    divisors = [n for n in range(1, min(total, 2 * wanted) + 1) if total % n == 0]
    return f"{option}=" + " or ".join(map(str, divisors[-3:]))


def _family(config: Mapping[str, Any]) -> Family:
    named = config.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ValueError(f"config.json: architectures={_shown(named)} must be a list of names")
    for family in FAMILIES.values():
        if named == [family.hf_architecture] or (not named and config.get("model_type") == family.name):
            return family
    what = ", ".join(named)[:200] if named else f"model_type={_shown(config.get('model_type'))}"
    supported = ", ".join(family.hf_architecture for family in FAMILIES.values())
    raise ValueError(f"config.json: architecture {what} is not supported; supported: {supported}")


def _int(config: Mapping[str, Any], key: str, family: Family, *, most: int = 2**31 - 1) -> int:
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


def _head_dim(config: Mapping[str, Any], family: Family, hidden_size: int, num_heads: int) -> int:
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


def _moe(config: Mapping[str, Any], family: Family) -> MoeArchitecture:
    key = "num_experts" if "num_experts" in config else "num_local_experts"
    num_experts = _int(config, key, family, most=_MOST_LAYERS)
    return MoeArchitecture(
        num_experts=num_experts,
        top_k=_int(config, "num_experts_per_tok", family, most=num_experts),
        ffn_hidden_size=_int(config, "moe_intermediate_size", family),
        norm_topk_prob=_flag(config, "norm_topk_prob"),
    )


def _refuse_unsupported(config: Mapping[str, Any], family: Family) -> None:
    """Returns nothing; raises ValueError for a field that changes the model beyond the tables."""
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


def _slides(config: Mapping[str, Any], family: Family) -> bool:
    window = config.get("sliding_window", 4096)  # Hugging Face's default in every family that has the field
    # Qwen's window is switched on by use_sliding_window; Mistral's applies whenever it is set.
    enabled = _flag(config, "use_sliding_window") or family.name == "mistral"
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

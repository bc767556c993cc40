"""The sizes and switches of a language model, and the parallel sizes that they allow.

``ModelArchitecture`` is what convert/ and actor/ share: convert/hf_config.py reads it from a Hugging Face config.json,
actor/model.py builds Megatron-Core's GPTModel from it, convert/rows.py reads tensor shapes from it.

This file does NOT import torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


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

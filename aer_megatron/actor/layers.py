"""Transformer-layer specs: TransformerEngine's where it is installed, Megatron-Core's local ones elsewhere.

This file does NOT build models; actor/model.py does.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.fp8_utils import get_fp8_align_size
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from aer_megatron.actor.attention import ExactAttention
from aer_megatron.convert.architecture import ModelArchitecture
from aer_megatron.parallel.platform import redirect_experts_to_cpu


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm of the local spec that also works under sequence parallelism.

    Megatron's own wrapper of torch's norm refuses sequence parallelism; what it needs is only that the weight is
    marked, so that finalize_model_grads adds its gradient over the tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **ignored: Any) -> None:
        del ignored
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def has_transformer_engine() -> bool:
    """Returns whether TransformerEngine's layers can run here: installed, and a CUDA device present."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def has_fused_weight_gradients() -> bool:
    """Returns whether weight gradients can be added to the fp32 buffers by the product that makes them.

    TransformerEngine's layers need nothing for it, but Megatron's own language-model head refuses to be built without
    apex's extension.
    """
    return has_transformer_engine() and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def describe_kernels(config: TransformerConfig) -> str:
    """Returns one line for the start of a run: whose layers, optimizer and fusions it uses."""
    from megatron.core.optimizer import Adam

    layers = "TransformerEngine's" if has_transformer_engine() else "Megatron-Core's local"
    owner = Adam.__module__.partition(".")[0]  # megatron-core takes TransformerEngine's, else apex's, else torch's
    fp8 = f"FP8 {config.fp8}, recipe {config.fp8_recipe}" if config.fp8 else "no FP8"
    fused = "on" if config.gradient_accumulation_fusion else "off"
    return f"{layers} layers ({fp8}), Adam of {owner}, fused accumulation of weight gradients {fused}"


def check_fp8(table: Mapping[str, Any]) -> None:
    """Returns nothing; raises ValueError where ``[megatron]`` has an FP8 option that nothing would follow."""
    if table.get("fp8_param"):
        raise ValueError(
            "megatron.fp8_param=true keeps weights in FP8 only; checkpoints, weight sync and the reference policy read "
            "them in full precision: leave it out (the optimizer's fp32 weights are rounded in every forward pass)"
        )
    if not table.get("fp8_wgrad", True):
        raise ValueError(
            "megatron.fp8_wgrad=false: TransformerEngine 2.20 has no such option any more and ignores it without a "
            "word; leave it out"
        )


def token_multiple(config: TransformerConfig) -> int:
    """Returns what a rank's tokens must be a multiple of for TransformerEngine's FP8 products; 1 without FP8."""
    return int(get_fp8_align_size(config.fp8_recipe)) if config.fp8 else 1


def decoder_spec(
    config: TransformerConfig, arch: ModelArchitecture, num_layers: int
) -> ModuleSpec | TransformerBlockSubmodules:
    """Returns the decoder's spec for ``num_layers`` layers of this pipeline stage."""
    experts = {"num_experts": arch.moe.num_experts} if arch.moe else {}
    if has_transformer_engine():
        grouped = {"moe_grouped_gemm": config.moe_grouped_gemm} if arch.moe else {}
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=arch.qk_norm, **experts, **grouped)
    if arch.moe:
        redirect_experts_to_cpu()
    spec = get_gpt_layer_local_spec(qk_layernorm=arch.qk_norm, normalization="RMSNorm", **experts)
    attention = spec.submodules.self_attention
    norms = {"q_layernorm": RMSNorm, "k_layernorm": RMSNorm} if arch.qk_norm else {}
    layer = dataclasses.replace(
        spec.submodules,
        input_layernorm=RMSNorm,
        pre_mlp_layernorm=RMSNorm,
        self_attention=dataclasses.replace(
            attention, submodules=dataclasses.replace(attention.submodules, core_attention=ExactAttention, **norms)
        ),
    )
    return TransformerBlockSubmodules(
        layer_specs=[dataclasses.replace(spec, submodules=layer)] * num_layers, layer_norm=RMSNorm
    )

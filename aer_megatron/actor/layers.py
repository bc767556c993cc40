"""Transformer-layer specs: TransformerEngine's where it is installed, Megatron-Core's local ones elsewhere.

This file does NOT build models; actor/model.py does.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

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
        self_attention=dataclasses.replace(attention, submodules=dataclasses.replace(attention.submodules, **norms)),
    )
    return TransformerBlockSubmodules(
        layer_specs=[dataclasses.replace(spec, submodules=layer)] * num_layers, layer_norm=RMSNorm
    )

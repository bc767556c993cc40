"""Tiny random models of every family: the one place where tests make a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

SIZES: dict[str, Any] = {
    "vocab_size": 25,  # odd: every tensor-parallel size pads it
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "initializer_range": 0.2,  # large enough that logits are far apart
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
THREE_HEADS = {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 3}

FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": False}),
    "llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True, **THREE_HEADS}),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, {"tie_word_embeddings": False, **EXPERTS}),
    "qwen3_moe_raw": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {"tie_word_embeddings": False, **EXPERTS, "norm_topk_prob": False},
    ),
}


def tiny_model(family: str = "qwen3", *, seed: int = 0, **changes: Any) -> Any:
    """Returns transformers' model of ``family``, fp32, random weights; ``changes`` replace entries of its config."""
    config_type, model_type, own = FAMILIES[family]
    torch.manual_seed(seed)
    return model_type(config_type(**SIZES | own | changes)).float().eval()


def tiny_hf_model(*, tied: bool = True, seed: int = 0, num_layers: int = 2, experts: bool = False) -> Any:
    """Returns the Qwen3 that most tests train, dense or with experts."""
    family = "qwen3_moe" if experts else "qwen3"
    return tiny_model(family, seed=seed, tie_word_embeddings=tied, num_hidden_layers=num_layers)


def save_tiny_model(family: str, folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """Returns ``folder``, newly written with random weights; norms are not all ones."""
    model = tiny_model(family, seed=seed)
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.2)
    model.to(dtype).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    return folder

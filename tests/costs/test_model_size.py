"""Parameter counts of the Qwen3 models to the unit: by hand, by transformers on the meta device, and per rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from aer_megatron.convert.architecture import ModelArchitecture
from aer_megatron.convert.hf_config import architecture_from_hf_config
from aer_megatron.costs.model_size import Layout, layer_parameters, parameter_count, rank_parameters

# config.json of the model cards: hidden, feed-forward, layers, heads, KV heads, tied; then the parameters, and the
# billions (all, without embeddings) that the cards publish.
QWEN3 = {
    "0.6B": (1024, 3072, 28, 16, 8, True, 596_049_920, 0.6, 0.44),
    "1.7B": (2048, 6144, 28, 16, 8, True, 1_720_574_976, 1.7, 1.4),
    "4B": (2560, 9728, 36, 32, 8, True, 4_022_468_096, 4.0, 3.6),
    "8B": (4096, 12288, 36, 32, 8, False, 8_190_735_360, 8.2, 6.95),
    "14B": (5120, 17408, 40, 40, 8, False, 14_768_307_200, 14.8, 13.2),
    "32B": (5120, 25600, 64, 64, 8, False, 32_762_123_264, 32.8, 31.2),
}
VOCAB = 151_936


def hf_config(name: str) -> dict[str, Any]:
    hidden, ffn, layers, heads, kv_heads, tied, *_ = QWEN3[name]
    return {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": hidden, "intermediate_size": ffn,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 128,
        "vocab_size": VOCAB, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "tie_word_embeddings": tied, "hidden_act": "silu",
    }  # fmt: skip


def architecture(name: str) -> ModelArchitecture:
    return architecture_from_hf_config(hf_config(name))


@pytest.mark.parametrize("name", QWEN3)
def test_counts_are_those_of_the_published_models(name: str) -> None:
    *_, exact, billions, without_embeddings = QWEN3[name]
    arch = architecture(name)
    assert parameter_count(arch) == exact
    digits = len(str(billions).split(".")[1])
    assert round(exact / 1e9, digits) == billions
    embeddings = VOCAB * arch.hidden_size * (1 if arch.tied_embeddings else 2)
    digits = len(str(without_embeddings).split(".")[1])
    assert round((exact - embeddings) / 1e9, digits) == without_embeddings


@pytest.mark.parametrize("name", QWEN3)
def test_counts_are_those_of_the_transformers_models(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen3Config(**hf_config(name)))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameter_count(architecture(name))


def test_experts_are_counted() -> None:
    table = {
        **hf_config("0.6B"), "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 8,
        "num_experts_per_tok": 2, "moe_intermediate_size": 768, "norm_topk_prob": True, "num_hidden_layers": 3,
        "decoder_sparse_step": 1, "mlp_only_layers": [],
    }  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**table))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameter_count(
        architecture_from_hf_config(table)
    )


def test_one_layer_of_8b_by_hand() -> None:
    layer = layer_parameters(architecture("8B"))
    attention = 4096 * (4096 + 2 * 1024) + 4096 * 4096
    assert (layer.split, layer.whole, layer.experts) == (attention + 3 * 4096 * 12288, 2 * 4096 + 2 * 128, 0)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 4), (8, 2)])
@pytest.mark.parametrize("name", ["0.6B", "8B"])
def test_ranks_hold_the_model_and_nothing_else(name: str, tp: int, pp: int) -> None:
    """Summed over ranks, what is split is there once, norms tp times and a tied embedding once more per last stage."""
    arch, layout = architecture(name), Layout(tp, pp, dp=1)
    held = sum(tp * rank_parameters(arch, layout, stage=stage, vocab_rows=VOCAB).total for stage in range(pp))
    whole = arch.num_layers * layer_parameters(arch).whole + arch.hidden_size
    copies = VOCAB * arch.hidden_size if arch.tied_embeddings and pp > 1 else 0
    assert held == parameter_count(arch) + (tp - 1) * whole + copies

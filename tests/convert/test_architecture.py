"""config.json -> ModelArchitecture, and which parallel sizes an architecture allows."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aer_megatron.convert.architecture import MoeArchitecture, check_parallel, pad_query_groups, padded_vocab_size
from aer_megatron.convert.hf_config import architecture_from_hf_config
from tests.support.json_values import JSON

ROPE_KEYS = ["rope_type", "type", "factor", "rope_theta", "partial_rotary_factor", "low_freq_factor", "x"]

# The published config.json files, reduced to the fields that matter.
QWEN3_8B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
SMOLLM2_135M: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-05,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}
QWEN2_05B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_30B_A3B: dict[str, Any] = QWEN3_8B | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
}


def test_qwen3_8b() -> None:
    arch = architecture_from_hf_config(QWEN3_8B)
    assert (arch.family, arch.qk_norm, arch.qkv_bias, arch.tied_embeddings) == ("qwen3", True, False, False)
    assert (arch.num_layers, arch.hidden_size, arch.ffn_hidden_size, arch.vocab_size) == (
        36,
        4096,
        12288,
        151936,
    )
    assert (arch.num_heads, arch.num_kv_heads, arch.head_dim, arch.heads_per_group) == (32, 8, 128, 4)
    assert (arch.rope_theta, arch.rope_scaling, arch.norm_eps) == (1e6, None, 1e-6)
    assert (arch.max_positions, arch.moe) == (40960, None)


def test_smollm2_and_qwen2_derive_the_head_dim() -> None:
    smollm2 = architecture_from_hf_config(SMOLLM2_135M)
    assert (smollm2.family, smollm2.head_dim, smollm2.tied_embeddings, smollm2.qk_norm) == (
        "llama",
        64,
        True,
        False,
    )
    qwen2 = architecture_from_hf_config(QWEN2_05B)
    assert (qwen2.family, qwen2.head_dim, qwen2.qkv_bias) == ("qwen2", 64, True)


def test_qwen3_moe() -> None:
    arch = architecture_from_hf_config(QWEN3_30B_A3B)
    assert (arch.family, arch.moe) == ("qwen3_moe", MoeArchitecture(128, 8, 768, True))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"rope_theta": 5e5}, (5e5, None)),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, (5e5, None)),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}}, (5e5, ("linear", 4.0))),
        (
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}},
            (5e5, ("linear", 2.0)),
        ),
        (
            {
                "rope_theta": 5e5,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
            },
            (5e5, ("llama3", 8.0)),
        ),
        ({}, (1e4, None)),
    ],
)
def test_both_spellings_of_rope(fields: dict[str, Any], expected: tuple[float, Any]) -> None:
    base = {key: value for key, value in SMOLLM2_135M.items() if not key.startswith("rope")}
    arch = architecture_from_hf_config(base | fields)
    scaling = arch.rope_scaling and (arch.rope_scaling["rope_type"], arch.rope_scaling["factor"])
    assert (arch.rope_theta, scaling) == expected


def test_transformers_writes_what_we_read() -> None:
    """A config.json of the installed transformers means what its config object says."""
    from transformers import Qwen3Config

    config = Qwen3Config(hidden_size=64, head_dim=24, num_key_value_heads=8, rope_parameters={"rope_theta": 7e4})
    arch = architecture_from_hf_config(config.to_dict() | {"architectures": ["Qwen3ForCausalLM"]})
    assert (arch.head_dim, arch.num_kv_heads, arch.rope_theta) == (24, 8, 7e4)
    assert (arch.tied_embeddings, arch.norm_eps) == (config.tie_word_embeddings, config.rms_norm_eps)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, ["GPT2LMHeadModel", "Qwen3ForCausalLM"]),
        ({"architectures": None, "model_type": "gemma3"}, ["gemma3", "LlamaForCausalLM"]),
        ({"num_hidden_layers": None}, ["num_hidden_layers"]),
        ({"num_key_value_heads": 5}, ["num_key_value_heads=5", "32"]),
        ({"hidden_act": "gelu"}, ["hidden_act='gelu'"]),
        ({"attention_bias": True}, ["attention_bias"]),
        ({"mlp_bias": True}, ["mlp_bias"]),
        ({"use_sliding_window": True, "sliding_window": 4096}, ["sliding_window=4096"]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["quantization_config", "dequantize"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ["yarn"]),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 2.0}},
            ["low_freq_factor=2.0"],
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, ["factor"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5"]),
        ({"architectures": ["MistralForCausalLM"]} | {"sliding_window": 4096}, ["sliding_window=4096"]),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        architecture_from_hf_config(QWEN3_8B | fields)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("fields", [{"mlp_only_layers": [0]}, {"decoder_sparse_step": 2}])
def test_dense_layers_among_experts_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        architecture_from_hf_config(QWEN3_30B_A3B | fields)


@pytest.mark.parametrize(
    ("vocab", "tp", "divisible_by", "expected"),
    [
        (151936, 8, 1, 151936),
        (151936, 8, 128, 152576),
        (19, 1, 1, 19),
        (19, 2, 1, 20),
        (19, 4, 8, 32),
        (32, 4, 8, 32),
    ],
)
def test_padded_vocab_size(vocab: int, tp: int, divisible_by: int, expected: int) -> None:
    assert padded_vocab_size(vocab, tp, divisible_by=divisible_by) == expected


def test_padded_vocab_size_refuses_zero() -> None:
    with pytest.raises(ValueError, match="divisible_by=0"):
        padded_vocab_size(10, 1, divisible_by=0)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2), (4, 4), (8, 9), (16, 1), (32, 36)])
def test_qwen3_8b_fits(tp: int, pp: int) -> None:
    """32 heads, 8 KV heads, 12288 wide, 36 layers; tp 16 and 32 have fewer KV heads than ranks."""
    check_parallel(architecture_from_hf_config(QWEN3_8B), tp, pp)


@pytest.mark.parametrize(
    ("config", "sizes", "words"),
    [
        (QWEN3_8B, (3, 1, 1, 1), ["parallel.tp=3", "32 attention heads", "use tp=1 or 2 or 4"]),
        (QWEN3_8B, (64, 1, 1, 1), ["parallel.tp=64"]),
        (QWEN3_8B, (1, 5, 1, 1), ["parallel.pp=5", "36 layers", "pp=4 or 6 or 9"]),
        (QWEN3_8B, (1, 4, 2, 1), ["pp * vpp = 4 * 2", "36 layers"]),
        (QWEN3_8B, (1, 1, 1, 2), ["parallel.ep=2", "1 expert"]),
        (QWEN3_8B, (0, 1, 1, 1), ["parallel.tp=0"]),
        (
            SMOLLM2_135M,
            (2, 1, 1, 1),
            ["parallel.tp=2", "9 attention heads", "12 heads in 4 groups", "use tp=1 or 3"],
        ),
        (
            QWEN3_8B | {"intermediate_size": 100},
            (8, 1, 1, 1),
            ["feed-forward width 100", "use tp=4 or 5 or 10"],
        ),
        (QWEN3_30B_A3B, (1, 1, 1, 3), ["parallel.ep=3", "128 expert"]),
    ],
)
def test_what_does_not_fit_is_refused(
    config: dict[str, Any], sizes: tuple[int, int, int, int], words: list[str]
) -> None:
    tp, pp, vpp, ep = sizes
    with pytest.raises(ValueError) as error:
        check_parallel(architecture_from_hf_config(config), tp, pp, vpp=vpp, ep=ep)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(("tp", "groups", "heads"), [(1, 3, 9), (2, 4, 12), (3, 3, 9), (4, 4, 12), (8, 8, 24)])
def test_smollm2_pads_whole_groups(tp: int, groups: int, heads: int) -> None:
    arch = pad_query_groups(architecture_from_hf_config(SMOLLM2_135M), tp)
    assert (arch.padded_kv_heads, arch.padded_heads) == (groups, heads)
    assert (arch.num_kv_heads, arch.num_heads) == (3, 9)
    check_parallel(arch, tp, 1)


BAD_NUMBERS = [0, -1, True, 1.5, "64", None, [1], 2**31, 10**30, math.nan]


@pytest.mark.parametrize(
    "key",
    [
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "vocab_size",
        "max_position_embeddings",
        "num_key_value_heads",
        "head_dim",
    ],
)
@pytest.mark.parametrize("value", BAD_NUMBERS)
def test_a_size_is_a_positive_integer(key: str, value: Any) -> None:
    if value is None and key in ("num_key_value_heads", "head_dim"):
        return  # Hugging Face's way of leaving them out
    with pytest.raises(ValueError, match=f"{key}="):
        architecture_from_hf_config(QWEN3_8B | {key: value})


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta"])
@pytest.mark.parametrize("value", [0, -1e-6, math.nan, math.inf, "1e-6", True, [1.0], 10**400])
def test_eps_and_theta_are_positive_and_finite(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{key}="):
        architecture_from_hf_config({**QWEN3_8B, "rope_parameters": None, key: value})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"head_dim": 127}, "head_dim = 127 must be even"),
        ({"rms_norm_eps": 1.0}, "rms_norm_eps=1.0 must be a number between 0 and 1"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false' must be true or false"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings=1 must be true or false"),
        ({"architectures": "Qwen3ForCausalLM"}, "architectures='Qwen3ForCausalLM' must be a list"),
        ({"architectures": [3]}, "must be a list of names"),
        ({"num_hidden_layers": 2**17}, "num_hidden_layers=131072 must be"),
        ({"layer_types": 3}, "layer_types=3 is not supported"),
        ({"layer_types": [["full_attention"]]}, "layer_types="),
        ({"rope_scaling": "linear"}, "rope_scaling or rope_parameters = 'linear' must be an object"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1}}, "factor=-1 must be a finite number above 0"),
        ({"rope_scaling": {"rope_type": ["x"]}}, "rope type"),
        ({"use_sliding_window": "yes"}, "use_sliding_window="),
        ({"use_sliding_window": True, "sliding_window": "x"}, "sliding_window='x'"),
    ],
)
def test_other_fields_that_are_not_what_they_should_be(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as caught:
        architecture_from_hf_config(QWEN3_8B | change)
    assert words in str(caught.value)


def test_more_experts_than_there_are_cannot_be_chosen() -> None:
    with pytest.raises(ValueError, match="num_experts_per_tok=129 must be a positive integer, at most 128"):
        architecture_from_hf_config(QWEN3_30B_A3B | {"num_experts_per_tok": 129})


KEYS = sorted({*QWEN3_30B_A3B, "rope_scaling", "rope_parameters", "partial_rotary_factor", "layer_types"})
KEYS += ["model_type", "attention_bias", "use_sliding_window", "sliding_window", "quantization_config"]


@pytest.mark.parametrize("config", [QWEN3_8B, QWEN3_30B_A3B, SMOLLM2_135M])
@given(key=st.sampled_from(KEYS), value=JSON | st.dictionaries(st.sampled_from(ROPE_KEYS), JSON, max_size=3))
def test_any_value_of_any_field_is_taken_or_named(config: dict[str, Any], key: str, value: Any) -> None:
    try:
        arch = architecture_from_hf_config(config | {key: value})
    except ValueError as error:
        assert "config.json" in str(error)
    else:
        assert arch.head_dim > 0 and arch.num_heads % arch.num_kv_heads == 0
        assert 0 < arch.rope_theta < math.inf and 0 < arch.norm_eps < 1

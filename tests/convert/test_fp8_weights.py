"""Block-FP8 weights as SGLang's loader takes them, checked with its own formula for reading them back."""

from __future__ import annotations

import torch

from aer_megatron.convert.fp8_weights import is_quantized, iter_fp8_weights, quantization_config

PREFIX = "model.layers.3."


def test_names() -> None:
    for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.experts.17.down_proj"):
        assert is_quantized(f"{PREFIX}{part}.weight")
    for name in (
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        f"{PREFIX}input_layernorm.weight",
        f"{PREFIX}self_attn.q_norm.weight",
        f"{PREFIX}self_attn.q_proj.bias",
        f"{PREFIX}mlp.gate.weight",  # the router
    ):
        assert not is_quantized(name)


def test_values_shapes_and_scales() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(300, 200, generator=generator).bfloat16() * 0.05
    weight[:128, 128:] = 0.0  # a block of zeros
    norm = torch.ones(200)
    tensors = dict(iter_fp8_weights([(f"{PREFIX}mlp.up_proj.weight", weight), ("model.norm.weight", norm)]))
    up_proj = f"{PREFIX}mlp.up_proj.weight"
    assert list(tensors) == [up_proj, f"{up_proj}_scale_inv", "model.norm.weight"]
    assert tensors["model.norm.weight"] is norm
    values, scale_inv = tensors[up_proj], tensors[f"{up_proj}_scale_inv"]
    assert (values.dtype, values.shape) == (torch.float8_e4m3fn, weight.shape)
    assert (scale_inv.dtype, scale_inv.shape) == (torch.float32, (3, 2))  # ceil(300 / 128), ceil(200 / 128)
    for i in range(3):
        for j in range(2):
            block = weight[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128].float().abs().max()
            expected = block / 448 if block > 0 else torch.tensor(1.0)
            torch.testing.assert_close(scale_inv[i, j], expected, rtol=1e-6, atol=0)
    # sglang.srt.layers.quantization.fp8_utils.block_quant_dequant
    repeated = scale_inv.repeat_interleave(128, dim=-2).repeat_interleave(128, dim=-1)[:300, :200]
    read = values.to(torch.float32) * repeated
    exact = weight.float()
    assert ((read - exact).abs() <= torch.maximum(exact.abs() * 2**-4, 2**-10 * repeated) * 1.0001).all()
    assert (read[:128, 128:] == 0).all()


def test_config_is_what_sglang_reads() -> None:
    config = quantization_config()
    assert config["quant_method"] == "fp8"
    assert config["activation_scheme"] == "dynamic"  # the only one that SGLang takes with blocks
    assert config["weight_block_size"] == [128, 128]

"""Hugging Face weights in the block-FP8 form that DeepSeek published and that SGLang loads.

    model.layers.0.mlp.up_proj.weight [N, K]  ->  ...up_proj.weight            float8_e4m3fn [N, K]
                                                  ...up_proj.weight_scale_inv  float32 [ceil(N / 128), ceil(K / 128)]

    value = FP8 value * weight_scale_inv of its 128 x 128 block,    weight_scale_inv = largest magnitude / 448

Projections of attention and MLP (experts included) are quantised; embedding, head, norms, biases and the router's gate
pass through. Blocks are cut from the whole tensor, never from a shard of it. This file does NOT talk to servers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from aer_megatron.convert.architecture import ModelArchitecture
from aer_megatron.convert.fp8_quantize import E4M3, Quantized, quantize_blocks
from aer_megatron.convert.mapping import hf_names
from aer_megatron.convert.safetensors_writer import TensorSpec

BLOCK = (128, 128)
SCALE_SUFFIX = "_scale_inv"
_PROJECTION = re.compile(r"(.*\.)?layers\.\d+\..*\.[a-z]+_proj\.weight")


def is_quantized(name: str) -> bool:
    """Returns whether the Hugging Face tensor ``name`` is stored in FP8."""
    return _PROJECTION.fullmatch(name) is not None


def quantize_weight(weight_NK: Tensor) -> Quantized:
    """Returns a projection's weight in FP8 with one scale per block of 128 x 128."""
    return quantize_blocks(weight_NK.detach().float(), E4M3, BLOCK, "any")


def dequantize_weight(values_NK: Tensor, scale_inv_IJ: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns what FP8 values and their scales stand for: the fp32 product, rounded to ``dtype``."""
    return Quantized(values_NK, scale_inv_IJ, BLOCK).dequantize().to(dtype)


def iter_fp8_weights(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of an FP8 checkpoint; a quantised weight is followed by its scales."""
    for name, tensor in weights:
        if is_quantized(name):
            values, scale_inv, _ = quantize_weight(tensor)
            yield name, values.contiguous()
            yield name + SCALE_SUFFIX, scale_inv
        else:
            yield name, tensor


def iter_rounded_weights(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yields the same names, shapes and dtypes with the values that an FP8 checkpoint of the weights stands for."""
    for name, tensor in weights:
        yield name, round_weight(name, tensor)


def round_weight(name: str, tensor: Tensor) -> Tensor:
    """Returns the tensor ``name`` quantised and dequantised, in its own dtype; itself where it is not quantised."""
    if not is_quantized(name):
        return tensor
    values_NK, scale_inv_IJ, _ = quantize_weight(tensor)
    return dequantize_weight(values_NK, scale_inv_IJ, tensor.dtype)


def fp8_specs(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Returns shape and dtype of every tensor of the FP8 checkpoint of a model that has ``specs``."""
    result = {}
    for name, spec in specs.items():
        result[name] = TensorSpec(spec.shape, E4M3) if is_quantized(name) else spec
        if is_quantized(name):
            blocks = tuple(-(-size // step) for size, step in zip(spec.shape, BLOCK, strict=True))
            result[name + SCALE_SUFFIX] = TensorSpec(blocks, torch.float32)
    return result


def quantization_config() -> dict[str, Any]:
    """Returns what config.json says of such a checkpoint under ``quantization_config``."""
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(BLOCK),
    }


def fp8_config(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config.json of the FP8 checkpoint of a model."""
    return dict(hf_config) | {"quantization_config": quantization_config()}


def split_blocks(arch: ModelArchitecture, tp_size: int) -> str:
    """Returns the first projection that SGLang's tensor-parallel ranks cannot hold in whole blocks, and why; or "".

    SGLang refuses a rank's part of q, k, v, gate, up or down that is not a multiple of 128, and its weight checker
    takes columns / scales for the block size, which is 128 only where the columns are a multiple of it.
    """
    for name, shape in hf_names(arch).items():
        if not is_quantized(name):
            continue
        by_column = name.endswith(("o_proj.weight", "down_proj.weight"))
        ranks = min(tp_size, arch.num_kv_heads) if name.endswith(("k_proj.weight", "v_proj.weight")) else tp_size
        parts = (shape[0], shape[1] // ranks) if by_column else (shape[0] // ranks, shape[1])
        if any(part % step for part, step in zip(parts, BLOCK, strict=True)):
            return f"{name} {list(shape)} gives {list(parts)} to each of {tp_size} tensor-parallel ranks"
    return ""

"""Hugging Face weights in the block-FP8 form that DeepSeek published and that SGLang loads.

    model.layers.0.mlp.up_proj.weight [N, K]  ->  ...up_proj.weight            float8_e4m3fn [N, K]
                                                  ...up_proj.weight_scale_inv  float32 [ceil(N / 128), ceil(K / 128)]

    value = FP8 value * weight_scale_inv of its 128 x 128 block,    weight_scale_inv = largest magnitude / 448

Projections of attention and MLP (experts included) are quantised; embedding, head, norms, biases and the router's gate
pass through. This file does NOT talk to servers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from aer_megatron.algo.fp8 import E4M3, Quantized, quantize_blocks

BLOCK = (128, 128)
SCALE_SUFFIX = "_scale_inv"
_PROJECTION = re.compile(r"(.*\.)?layers\.\d+\..*\.[a-z]+_proj\.weight")


def is_quantized(name: str) -> bool:
    """Returns whether the Hugging Face tensor ``name`` is stored in FP8."""
    return _PROJECTION.fullmatch(name) is not None


def quantize_weight(weight_NK: Tensor) -> Quantized:
    """Returns a projection's weight in FP8 with one scale per block of 128 x 128."""
    return quantize_blocks(weight_NK.detach().float(), E4M3, BLOCK, "any")


def iter_fp8_weights(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of an FP8 checkpoint; a quantised weight is followed by its scales."""
    for name, tensor in weights:
        if is_quantized(name):
            values, scale_inv, _ = quantize_weight(tensor)
            yield name, values.contiguous()
            yield name + SCALE_SUFFIX, scale_inv
        else:
            yield name, tensor


def quantization_config() -> dict[str, Any]:
    """Returns what config.json says of such a checkpoint under ``quantization_config``."""
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(BLOCK),
    }

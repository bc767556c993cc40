"""Tiny models that SGLang could serve in blocks of FP8, and the block form by loops, from its definition."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.support.tiny_models import tiny_model

QUANTIZED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 384,  # with TP 2 a rank's 192 rows end inside a block
    "num_attention_heads": 2,
    "head_dim": 128,
    "initializer_range": 0.05,
}


def fp8_model(seed: int, dtype: torch.dtype = torch.float32) -> Any:
    """Returns a Qwen3 with random weights whose blocks differ in size."""
    model = tiny_model(seed=seed, **SIZES).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_projection(name):
                rows, columns = (torch.linspace(0.5, 2.0, size) for size in parameter.shape)
                parameter.mul_(rows[:, None] * columns)
    return model


def fp8_model_weights(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in fp8_model(seed, dtype).named_parameters()}


def save_fp8_model(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Returns the folder with the unquantised model."""
    fp8_model(seed, dtype).save_pretrained(folder)
    return folder


def is_projection(name: str) -> bool:
    return name.endswith(tuple(f"{part}.weight" for part in QUANTIZED))


def fp8_tensors(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns what an FP8 checkpoint holds of Hugging Face weights, block by block."""
    made: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if not is_projection(name):
            made[name] = weight
            continue
        rows, columns = weight.shape
        values = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
        scales = torch.empty(-(-rows // 128), -(-columns // 128))
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                place = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
                block = weight[place].float()
                scale = torch.tensor(448.0) / block.abs().max()
                values[place] = (block * scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
                scales[i, j] = 1.0 / scale
        made[name], made[f"{name}_scale_inv"] = values, scales
    return made


def rounded_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights that such a checkpoint stands for, in their own dtype."""
    stored = fp8_tensors(weights)
    rounded = {}
    for name, weight in weights.items():
        scales = stored.get(f"{name}_scale_inv")
        rounded[name] = weight
        if scales is not None:
            repeated = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: weight.shape[0], : weight.shape[1]]
            rounded[name] = (stored[name].float() * repeated).to(weight.dtype)
    return rounded

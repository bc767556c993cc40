"""``rollout.quantization``: what goes with it, and the FP8 checkpoint that launched servers start from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from aer_megatron.actor.model import TORCH_DTYPES
from aer_megatron.config import Config
from aer_megatron.convert.architecture import ModelArchitecture
from aer_megatron.convert.folders import hf_to_fp8
from aer_megatron.convert.fp8_weights import fp8_config, split_blocks
from aer_megatron.convert.hf_writer import config_with_dtype
from aer_megatron.files.json_input import read_json_object

_TP_FLAGS = ("tp_size", "tp", "tensor_parallel_size")  # SGLang's spellings


def is_fp8(config: Config) -> bool:
    """Returns whether the engine's weights are in blocks of FP8."""
    return config.rollout.quantization == "fp8"


def check_quantization(config: Config, arch: ModelArchitecture) -> None:
    """Raises ValueError where the engine cannot hold, or be given, weights as ``rollout.quantization`` asks."""
    rollout, launch = config.rollout, config.sglang.launch
    if rollout.uses_servers and launch.get("quantization"):
        raise ValueError(
            f"sglang.launch.quantization={launch['quantization']!r} makes servers quantise at their start alone, and "
            "they cannot be given new weights then; leave it out and set rollout.quantization='fp8'"
        )
    if not is_fp8(config):
        return
    if rollout.logprob_gate:
        raise ValueError(
            f"rollout.logprob_gate={rollout.logprob_gate:g} stops a run whose engine holds other weights than its "
            "trainer, as it does with rollout.quantization='fp8'; set rollout.logprob_gate=0 (the metric "
            "rollout/logprob_diff_max has the difference)"
        )
    if rollout.uses_servers:
        _check_servers(config, arch)


def _check_servers(config: Config, arch: ModelArchitecture) -> None:
    launch = config.sglang.launch
    if config.model.dtype != "bf16":
        raise ValueError(
            f"model.dtype={config.model.dtype!r} with rollout.quantization='fp8': SGLang computes beside FP8 layers in "
            "bf16; set model.dtype='bf16', or rollout.engine='embedded'"
        )
    if launch.get("device") == "cpu":
        raise ValueError(
            "sglang.launch.device='cpu' with rollout.quantization='fp8': on a CPU, SGLang's FP8 layers need AMX and "
            "repack their weights, so that they cannot be updated; launch servers on GPUs, or set "
            "rollout.engine='embedded'"
        )
    tp_size = next((int(launch[flag]) for flag in _TP_FLAGS if flag in launch), 1)
    split = split_blocks(arch, tp_size)
    if split:
        raise ValueError(
            f"rollout.quantization='fp8' has blocks of 128 x 128, which SGLang does not split, but {split}; lower "
            f"sglang.launch.tp_size={tp_size}, or set rollout.quantization='none' or rollout.engine='embedded'"
        )


def fp8_checkpoint(config: Config) -> Path:
    """Returns the folder of ``run.output_dir`` with the FP8 checkpoint of ``model.path``, written unless it is there.

    One that an earlier start of the run left is used again: servers get the policy's weights before they serve.
    """
    source, target = Path(config.model.path), Path(config.run.output_dir) / "fp8_model"
    dtype = TORCH_DTYPES[config.model.dtype]
    if _config(target) != fp8_config(config_with_dtype(_config(source), dtype)):
        shutil.rmtree(target, ignore_errors=True)
        hf_to_fp8(source, target, dtype=dtype)
    return target


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    return read_json_object(file) if file.is_file() else {}

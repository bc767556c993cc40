"""Lets a real SGLang server hold weights in blocks of FP8 without a GPU: on its PYTHONPATH, Python imports this first.

SGLang ends at layers/quantization/fp8.py, "Fp8LinearMethod on CPU requires that CPU has AMX support", after it has read
the checkpoint; with AMX it would repack the weights, which then cannot be updated. Two names are replaced:
* fp8._is_cpu, so that loaded weights are left as they are on an H100 (without DeepGEMM's rescaling for Blackwell);
* the Triton kernel, by a product with the dequantised weight; activations are not quantised.
Loading, updates, the weight checker and everything else are SGLang's own.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from typing import Any


def _block_linear(
    input: Any, weight: Any, block_size: Any, weight_scale: Any, input_scale: Any = None, bias: Any = None, **_: Any
) -> Any:
    import torch
    from sglang.srt.layers.quantization.fp8_utils import block_quant_dequant

    return torch.nn.functional.linear(input, block_quant_dequant(weight, weight_scale, block_size, input.dtype), bias)


def _leave_weights(module: Any) -> None:
    module._is_cpu = False


def _replace_kernel(module: Any) -> None:
    module.triton_w8a8_block_fp8_linear = _block_linear


_QUANTIZATION = "sglang.srt.layers.quantization"
_CHANGES: dict[str, Callable[[Any], None]] = {
    f"{_QUANTIZATION}.fp8": _leave_weights,
    f"{_QUANTIZATION}.fp8_utils": _replace_kernel,
}


class _Changed(importlib.abc.MetaPathFinder):
    """Applies the change of a module once it is loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _CHANGES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        assert spec is not None and spec.loader is not None
        run = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            run(module)
            _CHANGES[fullname](module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Changed())

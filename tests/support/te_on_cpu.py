"""TransformerEngine's Python on a machine without a GPU: its compiled extension replaced by a few lines of torch.

``install()`` puts a stand-in for ``transformer_engine_torch`` in front of the pure-Python wheel ``transformer-engine``
and makes its checks for a device pass. What runs then is TransformerEngine's own Python (modules, autograd functions,
FP8 state, reference quantizers, attention without fused kernels, FusedAdam) and Megatron-Core's wiring of it; the
kernels below it are ours. It says nothing about TransformerEngine's kernels.

It comes before the first import of megatron.core and cannot be undone: use a process for it alone.

Shape suffixes: M rows, K columns, b sequences, s padded length, t packed tokens, h heads, d head size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import importlib
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_DTYPES = "kByte kInt32 kFloat32 kFloat16 kBFloat16 kFloat8E4M3 kFloat8E5M2 kFloat4E2M1"
DType = enum.IntEnum("DType", _DTYPES, start=0)  # type: ignore[misc]
_TORCH = {DType.kFloat32: torch.float32, DType.kFloat16: torch.float16, DType.kBFloat16: torch.bfloat16}
# the order is that of the quantizers of a backward pass
_BACKWARD = "GRAD_OUTPUT1 GRAD_INPUT1 GRAD_OUTPUT2 GRAD_INPUT2 GRAD_OUTPUT3 GRAD_INPUT3"


class _Numbers(type):
    """A C++ enumeration of whatever names are asked for."""

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        number = len(cls.__members__)
        setattr(cls, name, number)
        return number

    @property
    def __members__(cls) -> set[str]:
        return {name for name, value in vars(cls).items() if isinstance(value, int)}


class _Extension(types.ModuleType):
    """The compiled module: the functions that follow, and a placeholder for each other name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value: Any = _Numbers(name, (), {}) if name[0].isupper() else _missing(name)
        setattr(self, name, value)
        return value


def _missing(name: str) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"transformer_engine_torch.{name} is a kernel that has no stand-in")

    return kernel


def rmsnorm_fwd(
    x_MK: Tensor, weight: Tensor, eps: float, out: Any, quantizer: Any, dtype: Any, margin: int, centered: bool
) -> tuple[Tensor, None, Tensor]:
    """Returns (normalised rows, None, what the backward pass needs: here eps)."""
    assert out is None and quantizer is None and not centered
    y_MK = F.rms_norm(x_MK, weight.shape, weight, eps)
    return y_MK.to(_TORCH[DType(int(dtype))]), None, torch.tensor(eps, dtype=torch.float64)


def rmsnorm_bwd(
    grad_MK: Tensor, x_MK: Tensor, eps: Tensor, weight: Tensor, margin: int, centered: bool
) -> tuple[Tensor, ...]:
    """Returns the gradients of the rows and of the weight."""
    leaves = [leaf.detach().requires_grad_() for leaf in (x_MK, weight)]
    with torch.enable_grad():
        y_MK = F.rms_norm(leaves[0], weight.shape, leaves[1], float(eps))
    return torch.autograd.grad(y_MK, leaves, grad_MK)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _product(a: Tensor, b: Tensor, transa: bool, transb: bool) -> Tensor:
    """Returns op(B) op(A): cuBLAS counts columns first."""
    return (_rows(b).t() if transb else b) @ (a.t() if transa else _rows(a))


def generic_gemm(
    a: Tensor, transa: bool, b: Tensor, transb: bool, out: Tensor | None, quantizer: Any, dtype: Any,
    bias: Tensor | None, bias_dtype: Any, gelu: bool, gelu_in: Any, grad: bool, workspace: Any, workspace_size: int,
    accumulate: bool, split_accumulator: bool, **overlap: Any,
) -> tuple[Tensor, Tensor | None, None, None]:  # fmt: skip
    """Returns (product, gradient of the bias, None, None)."""
    assert quantizer is None and not gelu and overlap["comm_overlap"] is None
    result = _product(a, b, transa, transb)
    has_bias = bias is not None and bias.numel() > 0
    grad_bias = _rows(b).sum(0) if grad and has_bias else None
    if has_bias and not grad:
        result = result + bias
    if dtype is not None:
        result = result.to(_TORCH[DType(int(dtype))])
    if out is not None:
        result = out.add_(result) if accumulate else out.copy_(result)
    return result, grad_bias, None, None


def te_general_grouped_gemm(
    a: list[Any], transa: bool, b: list[Any], transb: bool, out: list[Tensor], dtype: Any, splits: Any, bias: Any,
    bias_dtype: Any, single_output: bool, gelu_in: Any, grad: bool, workspaces: Any, workspace_size: int,
    accumulate: bool, *rest: Any,
) -> Any:  # fmt: skip
    """Returns ``bias``; writes each product to its part of ``out``, that of reference quantizers by their own code."""
    from transformer_engine.pytorch.custom_recipes.gemm import custom_gemm

    layout = f"{'NT'[transa]}{'NT'[transb]}"
    parts = out[0].split([int(size) for size in splits]) if single_output else out
    for a_i, b_i, out_i in zip(a, b, parts, strict=True):
        if isinstance(a_i, Tensor):
            product = _product(a_i, b_i, transa, transb)
        else:
            product = custom_gemm(a_i, b_i, None, out_i.dtype, layout=layout, grad=layout != "TN")[0]
        out_i.add_(product) if accumulate else out_i.copy_(product)
    return bias


def bgrad_quantize(grad: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    """Returns the gradient of a bias and the quantized gradient of the output."""
    return _rows(grad).sum(0), quantizer(grad)


def convert_thd_to_bshd(packed_thd: Tensor, ends_n: Tensor, num_sequences: int, longest: int) -> Tensor:
    """Returns packed sequences as a rectangle [b, s, h, d], zeros behind the end of each."""
    whole_bshd = packed_thd.new_zeros(num_sequences, longest, *packed_thd.shape[1:])
    for row, sequence in zip(whole_bshd, packed_thd.split(ends_n.diff().tolist()), strict=True):
        row[: len(sequence)] = sequence
    return whole_bshd


def convert_bshd_to_thd(padded_bshd: Tensor, ends_n: Tensor, num_tokens: int) -> Tensor:
    """Returns the sequences of a rectangle packed, [t, h, d]."""
    packed = torch.cat([row[:length] for row, length in zip(padded_bshd, ends_n.diff().tolist(), strict=True)])
    assert len(packed) == num_tokens
    return packed


def fused_multi_row_padding(rows_MK: Tensor, out: Tensor, sizes: list[int], new_sizes: list[int]) -> None:
    """Writes groups of rows to ``out``, zeros where a group's place is larger and its first rows where smaller."""
    out.zero_()
    for group, place in zip(rows_MK.split(sizes), out.split(new_sizes), strict=True):
        number = min(len(group), len(place))
        place[:number] = group[:number]


def multi_tensor_l2norm(chunk: int, overflow: Any, tensors: list[list[Tensor]], per_tensor: bool) -> tuple[Tensor, Any]:
    """Returns (length of all tensors together, None)."""
    assert not per_tensor
    return torch.stack([tensor.float().norm() for tensor in tensors[0]]).norm().view(1), None


def multi_tensor_scale(chunk: int, overflow: Any, tensors: list[list[Tensor]], factor: Any) -> None:
    """Writes the tensors of the first list times ``factor`` to those of the second."""
    for source, target in zip(*tensors, strict=True):
        target.copy_(source * factor)


def multi_tensor_adam(
    chunk: int, overflow: Any, tensors: list[list[Tensor]], lr: float, beta1: float, beta2: float, eps: float,
    step: int, decoupled: int, correct: int, weight_decay: float,
) -> None:  # fmt: skip
    """Takes a step of AdamW in place; the lists are gradients, parameters and both moments."""
    assert decoupled and correct
    for grad, parameter, mean, square in zip(*tensors, strict=True):
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        change = (mean / (1 - beta1**step)) / ((square / (1 - beta2**step)).sqrt() + eps) + weight_decay * parameter
        parameter.sub_(lr * change)


_KERNELS = (
    rmsnorm_fwd, rmsnorm_bwd, generic_gemm, te_general_grouped_gemm, bgrad_quantize, convert_thd_to_bshd,
    convert_bshd_to_thd, fused_multi_row_padding, multi_tensor_l2norm, multi_tensor_scale, multi_tensor_adam,
)  # fmt: skip


class _OnDevice(TorchFunctionMode):
    """Every tensor says that it is on a device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_cuda = torch.Tensor.is_cuda.__get__  # type: ignore[attr-defined]
        return True if func == is_cuda else func(*args, **(kwargs or {}))


def _pretend_device(base: Any, attention: Any) -> None:
    """Has TransformerEngine's checks for a device pass: when a module is made, and before its forward pass."""
    construct, prepare, attend = base.__init__, base.prepare_forward, attention.forward

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        with mock.patch.object(torch.cuda, "is_available", lambda: True):
            construct(self, *args, **kwargs)

    def prepare_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _OnDevice():
            return prepare(self, *args, **kwargs)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _OnDevice():
            return attend(self, *args, **kwargs)

    base.__init__, base.prepare_forward, attention.forward = __init__, prepare_forward, forward
    hopper = types.SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    torch.cuda.get_device_properties = lambda device=None: hopper  # type: ignore[assignment,return-value]
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment]


def _recompute_on_cpu(distributed: Any) -> None:
    """Has TransformerEngine's own recomputation use the CPU's random state, and the CPU in backward passes."""
    from aer_megatron.parallel.platform import _CpuForCuda

    recompute = distributed._CheckpointFunction.backward

    def backward(ctx: Any, *grads: Any) -> Any:
        with _CpuForCuda():
            return recompute(ctx, *grads)

    distributed._CheckpointFunction.backward = staticmethod(backward)
    distributed._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    distributed._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def install() -> None:
    """Makes ``transformer_engine.pytorch`` importable and runnable on the CPU."""
    if "megatron.core" in sys.modules or "transformer_engine" in sys.modules:
        raise RuntimeError("te_on_cpu.install() comes before the first import of megatron.core")
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # no search for CUDA's libraries
    extension = _Extension("transformer_engine_torch")
    for function in _KERNELS:
        setattr(extension, function.__name__, function)
    for name in ("layernorm_fwd", "layernorm_bwd"):  # looked up whatever the norm is
        setattr(extension, name, _missing(name))
    extension.fused_multi_row_unpadding = fused_multi_row_padding
    extension.multi_tensor_scale_tensor = multi_tensor_scale
    extension.DType = DType
    extension.FP8BwdTensors = enum.IntEnum("FP8BwdTensors", _BACKWARD, start=0)  # type: ignore[misc]
    extension.get_cudnn_version = lambda: 91500
    extension.get_num_cublas_streams = lambda: 1
    sys.modules[extension.__name__] = extension
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the compiled extension is missed
        common = importlib.import_module("transformer_engine").common
        common.load_framework_extension = lambda framework: None
        te = importlib.import_module("transformer_engine.pytorch")
    _pretend_device(te.module.base.TransformerEngineBaseModule, te.DotProductAttention)
    _recompute_on_cpu(te.distributed)


@contextlib.contextmanager
def layer_specs(te: bool, *, exact_attention: bool = False) -> Iterator[None]:
    """Has models that are built inside take TransformerEngine's layers, as on a device, or the local ones.

    ``exact_attention`` puts the local layers' core attention in the place of TransformerEngine's.
    """
    from aer_megatron.actor import layers

    make_spec = layers.get_gpt_layer_with_transformer_engine_spec

    def spec(*args: Any, **kwargs: Any) -> Any:
        made = make_spec(*args, **kwargs)
        attention = made.submodules.self_attention
        inner = dataclasses.replace(attention.submodules, core_attention=layers.ExactAttention)
        attention = dataclasses.replace(attention, submodules=inner)
        return dataclasses.replace(made, submodules=dataclasses.replace(made.submodules, self_attention=attention))

    with contextlib.ExitStack() as stack:
        for module in ("layers", "model"):
            stack.enter_context(mock.patch(f"aer_megatron.actor.{module}.has_transformer_engine", lambda: te))
        if exact_attention:
            stack.enter_context(mock.patch.object(layers, "get_gpt_layer_with_transformer_engine_spec", spec))
        yield


@contextlib.contextmanager
def torch_adam() -> Iterator[None]:
    """Has Megatron-Core build torch's AdamW, as it does where TransformerEngine and apex are not installed."""
    import megatron.core.optimizer as optimizer
    from megatron.core.optimizer import distrib_optimizer

    with (
        mock.patch.multiple(optimizer, Adam=torch.optim.AdamW, USING_PYTORCH_OPTIMIZER=True),
        mock.patch.multiple(distrib_optimizer, HAVE_APEX_OR_TE=False, USING_TE_OPTIMIZER=False),
    ):
        yield


def updates_on_ranks(rank: int, world_size: int, layouts: list[Any], megatron: dict[str, Any]) -> list[Any]:
    """Returns, on rank 0 of ``run_distributed``, ``layout_matrix.update`` of each layout with these layers."""
    install()
    from aer_megatron.parallel.platform import install_platform, redirect_experts_to_cpu
    from tests.support import layout_matrix

    install_platform()
    redirect_experts_to_cpu()
    config = functools.partial(layout_matrix.policy_config, megatron=megatron)
    results = []
    with layer_specs(te=True), mock.patch.object(layout_matrix, "policy_config", config):
        for layout in layouts:
            topology = layout_matrix.build_topology(config(parallel=layout.parallel()))
            results.append(layout_matrix.update(layout, layout_matrix.Variant(), topology))
    return results if rank == 0 else []


class ExactProducts(TorchDispatchMode):
    """Matrix products of both passes in fp64, rounded once: the order in which they are added does not matter.

    ``num_scaled`` counts those of FP8 operands.
    """

    num_scaled = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            return torch.matmul(args[0].double(), args[1].double()).to(args[0].dtype)
        if func is torch.ops.aten._scaled_mm.default:
            self.num_scaled += 1
            return _scaled_product(*args, **kwargs)
        return func(*args, **kwargs)


def _scaled_product(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None = None, scale_result: Any = None,
    out_dtype: torch.dtype | None = None, use_fast_accum: bool = False,
) -> Tensor:  # fmt: skip
    """Returns the product of FP8 operands, the bias added before it is rounded."""
    product = torch.matmul((a.float() * scale_a).double(), (b.float() * scale_b).double())
    return (product if bias is None else product + bias.double()).to(out_dtype)

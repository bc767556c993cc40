"""FP8 training emulated on a CPU: linear layers of the local spec whose operands are rounded to FP8.

    forward    Y = Q(X) Q(W)^T          Q rounds to e4m3
    backward  dX = Q(dY) Q(W)           to e5m2 for dY under fp8 = "hybrid"; the rounding itself has gradient 1
              dW = Q(dY)^T Q(X)

Recipes and settings are Megatron-Core's (fp8, fp8_recipe, fp8_margin, ...); what is rounded, along which axis and with
which scale follows TransformerEngine's modules (arithmetic: convert/fp8_quantize.py). THE MATRIX PRODUCT ITSELF RUNS IN
FP32 on the dequantised values: the rounding of the operands is that of the hardware, its accumulation is not.
Embedding, language-model head, norms, router, attention product and everything about entropy stay in the model's
precision.

Tensor parallelism: a scale is that of the rank's own shard, except that delayed scaling takes the largest amax over its
reduction group (tensor x data x context parallel), so that shards round like the whole. Under sequence parallelism the
gathered tensor is rounded, which is what reducing the amax of its parts does.

This file does NOT decide whether FP8 is emulated; actor/model.py does.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import deque
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from aer_megatron.convert.fp8_quantize import (
    E4M3,
    E5M2,
    ScaleRule,
    amax_of,
    delayed_update,
    quantize_blocks,
    quantize_tensor,
    scale_of_amax,
)

RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
_BLOCK_RULE: dict[str, ScaleRule] = {"blockwise": "power_of_two", "mxfp8": "e8m0"}
_BLOCK_SIZE = {"blockwise": 128, "mxfp8": 32}
# places of the tensors in the delayed recipe's buffers; the output gradient has buffers of its own
_INPUT, _WEIGHT, _GRADIENT = 0, 1, 0

Operands = tuple[Tensor, Tensor | None]  # rounded along the columns and, where the backward needs it, along the rows


@dataclasses.dataclass(frozen=True, slots=True)
class Fp8Emulation:
    """What Megatron's ``fp8*`` fields ask for. Example: ``Fp8Emulation("tensorwise", E5M2, 0, 1, "most_recent")``."""

    recipe: str
    gradient_dtype: torch.dtype
    margin: int
    amax_history_len: int
    amax_compute_algo: str
    tp_only_amax_reduction: bool = False
    layers_at_start: int = 0  # in high precision
    layers_at_end: int = 0

    def describe(self) -> str:
        """Returns one line for the start of a run."""
        gradients = "e5m2" if self.gradient_dtype == E5M2 else "e4m3"
        delayed = (
            f", amax history {self.amax_history_len} ({self.amax_compute_algo}), margin {self.margin}"
            if self.recipe == "delayed"
            else ""
        )
        kept = (
            f", {self.layers_at_start} first and {self.layers_at_end} last layers in high precision"
            if self.layers_at_start or self.layers_at_end
            else ""
        )
        return (
            f"FP8 emulated on CPU: recipe {self.recipe}, e4m3 forward, {gradients} gradients{delayed}{kept}; "
            "matrix products in fp32 on the rounded values"
        )


def fp8_settings(fp8: str, config: TransformerConfig) -> Fp8Emulation:
    """Returns the emulation of format ``fp8`` with the ``fp8_*`` settings of ``config``, whose own ``fp8`` is off.

    Raises:
        ValueError: a format, a recipe or an option that has no emulation.
    """
    if fp8 not in ("hybrid", "e4m3"):
        raise ValueError(f"megatron.fp8={fp8!r} is not a format; use hybrid or e4m3")
    if config.fp8_recipe not in RECIPES:
        raise ValueError(
            f"megatron.fp8_recipe={config.fp8_recipe!r} has no emulation on CPU; use one of {', '.join(RECIPES)}"
        )
    for name in ("fp8_dot_product_attention", "fp8_multi_head_attention"):
        if getattr(config, name):
            raise ValueError(
                f"megatron.{name}=True has no emulation on CPU, which rounds the operands of linear layers only; leave "
                "it out here"
            )
    kept = config.first_last_layers_bf16
    if kept and config.fp8_recipe == "delayed":
        raise ValueError(
            "megatron.first_last_layers_bf16=true does not go with fp8_recipe='delayed' in Megatron-Core; use another "
            "recipe or set it to false"
        )
    return Fp8Emulation(
        recipe=config.fp8_recipe,
        gradient_dtype=E5M2 if fp8 == "hybrid" else E4M3,
        margin=config.fp8_margin,
        amax_history_len=config.fp8_amax_history_len,
        amax_compute_algo=config.fp8_amax_compute_algo,
        tp_only_amax_reduction=config.tp_only_amax_red,
        layers_at_start=config.num_layers_at_start_in_bf16 if kept else 0,
        layers_at_end=config.num_layers_at_end_in_bf16 if kept else 0,
    )


def emulated_block(
    block: TransformerBlockSubmodules, settings: Fp8Emulation, *, first_layer: int, num_layers: int
) -> TransformerBlockSubmodules:
    """Returns ``block`` with emulated linear layers, but for the model's first and last layers kept in high precision.

    Args:
        block: specs of one pipeline stage, in order.
        first_layer: number of the stage's first layer in the model, from 0.
        num_layers: layers of the whole model.
    """
    fp8_layers = range(settings.layers_at_start, num_layers - settings.layers_at_end)
    specs = [
        _with_emulated_linears(spec, settings) if first_layer + index in fp8_layers else spec
        for index, spec in enumerate(block.layer_specs)
    ]
    return dataclasses.replace(block, layer_specs=specs)


def _with_emulated_linears(spec: Any, settings: Fp8Emulation) -> Any:
    """Returns a spec, or a table of specs, in which every parallel linear layer is an emulated one."""
    emulated = {ColumnParallelLinear: Fp8ColumnParallelLinear, RowParallelLinear: Fp8RowParallelLinear}
    if isinstance(spec, type):
        return ModuleSpec(module=emulated[spec], params={"fp8": settings}) if spec in emulated else spec
    if dataclasses.is_dataclass(spec) and not isinstance(spec, type):
        changed = {f.name: _with_emulated_linears(getattr(spec, f.name), settings) for f in dataclasses.fields(spec)}
        # the module of a spec that is no leaf stays what it is
        return dataclasses.replace(spec, **changed | ({"module": spec.module} if isinstance(spec, ModuleSpec) else {}))
    if isinstance(spec, functools.partial):  # the feed-forward part, from megatron-core 0.19 on
        keywords = {name: _with_emulated_linears(value, settings) for name, value in spec.keywords.items()}
        return functools.partial(spec.func, *spec.args, **keywords)
    if isinstance(spec, list):
        return [_with_emulated_linears(item, settings) for item in spec]
    return spec


class Fp8Linear(torch.nn.Module):
    """The emulated part of both parallel linear layers; stands before Megatron's class in the bases."""

    fp8: Fp8Emulation
    delayed: DelayedScaling | None
    fp8_scale_forward: Tensor
    fp8_scale_backward: Tensor
    fp8_amax_history_forward: Tensor
    fp8_amax_history_backward: Tensor

    def __init__(self, *args: Any, fp8: Fp8Emulation, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fp8 = fp8
        self.delayed = None  # set by DelayedScaling, which sees the whole decoder
        if fp8.recipe == "delayed":
            for name, count in (("forward", 2), ("backward", 1)):
                history_LQ = torch.zeros(fp8.amax_history_len, count, dtype=torch.float32)
                self.register_buffer(f"fp8_amax_history_{name}", history_LQ)
                self.register_buffer(f"fp8_scale_{name}", torch.ones(count, dtype=torch.float32))

    def _forward_impl(
        self,
        input: Tensor,
        weight: Tensor,
        *,
        bias: Tensor | None,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: Any,
        **ignored: Any,
    ) -> Tensor:
        """Returns the product, [S, b, out]; Megatron's forward calls it with its own choice of communication."""
        assert not ignored.get("gradient_accumulation_fusion"), "needs a device"
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        if self.delayed is not None:
            self.delayed.enter(self)  # here, because an autograd function always runs without gradients
        output: Tensor = _EmulatedProduct.apply(input, weight, bias, self)  # type: ignore[no-untyped-call]
        return output

    def round_operand(self, x_MK: Tensor, role: str, *, both: bool) -> Operands:
        """Returns fp32 ``x_MK`` rounded for products along its columns and, with ``both``, along its rows.

        ``role`` is input, weight or gradient.
        """
        dtype = self.fp8.gradient_dtype if role == "gradient" else E4M3
        if self.fp8.recipe in _BLOCK_RULE:
            rule, size = _BLOCK_RULE[self.fp8.recipe], _BLOCK_SIZE[self.fp8.recipe]
            if self.fp8.recipe == "blockwise" and role == "weight":
                square = quantize_blocks(x_MK, dtype, (size, size), rule).dequantize()
                return square, square
            along_columns = quantize_blocks(x_MK, dtype, (1, size), rule).dequantize()
            return along_columns, quantize_blocks(x_MK, dtype, (size, 1), rule).dequantize() if both else None
        amax = amax_of(x_MK)
        if self.fp8.recipe == "delayed":
            assert self.delayed is not None, "attach_delayed_scaling comes first"
            scale = self.delayed.scale(self, role, amax)
        else:
            scale = scale_of_amax(amax, dtype, "any")
        rounded = quantize_tensor(x_MK, dtype, scale).dequantize()
        return rounded, rounded


class Fp8ColumnParallelLinear(Fp8Linear, ColumnParallelLinear):  # type: ignore[misc]
    """Megatron's column-parallel linear layer with FP8 operands."""


class Fp8RowParallelLinear(Fp8Linear, RowParallelLinear):  # type: ignore[misc]
    """Megatron's row-parallel linear layer with FP8 operands."""


class _EmulatedProduct(torch.autograd.Function):
    """y = Q(x) Q(w)^T + bias, rounded once, with rounded operands in the backward products too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: Fp8Linear) -> Tensor:
        wanted = any(ctx.needs_input_grad)
        x_MK, weight_NK = x.detach().reshape(-1, x.shape[-1]).float(), weight.detach().float()
        x_columns_MK, x_rows_MK = layer.round_operand(x_MK, "input", both=wanted)
        weight_columns_NK, weight_rows_NK = layer.round_operand(weight_NK, "weight", both=wanted)
        ctx.layer, ctx.shape = layer, x.shape
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        if wanted:
            ctx.save_for_backward(x_rows_MK, weight_rows_NK)
        y_MN = x_columns_MK @ weight_columns_NK.t()
        if bias is not None:
            y_MN += bias.detach().float()
        return y_MN.to(x.dtype).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:  # type: ignore[override]
        x_rows_MK, weight_rows_NK = ctx.saved_tensors
        grad_MN = grad.reshape(-1, grad.shape[-1]).float()
        columns_MN, rows_MN = ctx.layer.round_operand(grad_MN, "gradient", both=True)
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        grad_x = (columns_MN @ weight_rows_NK).to(x_dtype).view(ctx.shape)
        grad_weight = (rows_MN.t() @ x_rows_MK).to(weight_dtype)
        if ctx.layer.delayed is not None:
            ctx.layer.delayed.after_backward(ctx.layer)
        grad_bias = None if bias_dtype is None else grad_MN.sum(0).to(bias_dtype)
        return grad_x, grad_weight, grad_bias, None


class DelayedScaling:
    """The scales of a decoder's emulated layers under the delayed recipe, updated when TransformerEngine does it.

    Forward scales move at the end of a forward pass with gradients, backward scales at the end of a backward pass. A
    forward pass without gradients moves nothing, but its amax counts at the next update. A recomputed forward sees the
    scales of the pass that it repeats and records nothing.
    """

    def __init__(self, layers: list[Fp8Linear], settings: Fp8Emulation) -> None:
        self._layers = layers
        self._settings = settings
        self._in_forward = False
        self._training = False
        self._first: Fp8Linear | None = None  # of the forward pass: its backward ends the backward pass
        self._kept: dict[int, deque[Tensor]] = {id(layer): deque() for layer in layers}

    def attach(self, decoder: torch.nn.Module) -> None:
        """Has the decoder's forward pass drive the updates."""
        for layer in self._layers:
            layer.delayed = self
        decoder.register_forward_pre_hook(lambda *_: self._begin())
        decoder.register_forward_hook(lambda *_: self._end())

    def enter(self, layer: Fp8Linear) -> None:
        """Notes that ``layer`` is about to run; keeps its scales where the pass will be repeated."""
        if not self._in_forward:
            return
        if self._first is None:
            self._first = layer
        if self._training and not torch.is_grad_enabled():  # inside a checkpointed region
            self._kept[id(layer)].append(layer.fp8_scale_forward.clone())

    def scale(self, layer: Fp8Linear, role: str, amax: Tensor) -> Tensor:
        """Returns the scale (one element) for a tensor of ``layer`` and notes its ``amax``."""
        if role == "gradient":
            _note(layer.fp8_amax_history_backward, _GRADIENT, amax)
            return layer.fp8_scale_backward[_GRADIENT]
        column = _INPUT if role == "input" else _WEIGHT
        if not self._in_forward:  # recomputation, in a backward pass
            kept = self._kept[id(layer)]
            return (kept[0] if role == "input" else kept.popleft())[column]
        _note(layer.fp8_amax_history_forward, column, amax)
        return layer.fp8_scale_forward[column]

    def after_backward(self, layer: Fp8Linear) -> None:
        """Moves the backward scales once the first layer, the last in a backward pass, is done."""
        if layer is self._first:
            self._update("backward", self._settings.gradient_dtype)

    def num_kept(self) -> int:
        """Returns how many forward passes of layers wait for their repetition: 0 between two steps."""
        return sum(map(len, self._kept.values()))

    def _begin(self) -> None:
        self._in_forward, self._training = True, torch.is_grad_enabled()

    def _end(self) -> None:
        self._in_forward = False
        if self._training:
            self._update("forward", E4M3)

    @torch.no_grad()
    def _update(self, direction: str, dtype: torch.dtype) -> None:
        histories = [layer.get_buffer(f"fp8_amax_history_{direction}") for layer in self._layers]
        latest = torch.cat([history_LQ[0] for history_LQ in histories])
        group = parallel_state.get_amax_reduction_group(
            with_context_parallel=True, tp_only_amax_red=self._settings.tp_only_amax_reduction
        )
        if group.size() > 1:
            torch.distributed.all_reduce(latest, op=torch.distributed.ReduceOp.MAX, group=group)
        for layer, history_LQ, row_Q in zip(
            self._layers, histories, latest.split([h.shape[1] for h in histories]), strict=True
        ):
            history_LQ[0] = row_Q
            scale_Q = layer.get_buffer(f"fp8_scale_{direction}")
            new = delayed_update(
                history_LQ, scale_Q, dtype, margin=self._settings.margin, algo=self._settings.amax_compute_algo
            )
            history_LQ.copy_(new[0])
            scale_Q.copy_(new[1])


def _note(history_LQ: Tensor, column: int, amax: Tensor) -> None:
    latest = history_LQ[0, column]
    latest.copy_(torch.maximum(latest, amax))


def has_fresh_scales(model: torch.nn.Module, config: TransformerConfig) -> bool:
    """Returns whether delayed scales, emulated or TransformerEngine's, still have the 1 that they begin with.

    Under a scale of 1 most weights are subnormal FP8 numbers, so nothing may be measured before the first update.
    """
    emulated = [layer for layer in model.modules() if isinstance(layer, Fp8Linear)]
    if emulated:
        is_delayed = emulated[0].fp8.recipe == "delayed"
        return is_delayed and all(bool((layer.fp8_scale_forward == 1).all()) for layer in emulated)
    if not config.fp8 or config.fp8_recipe != "delayed":
        return False
    # TransformerEngine's modules have no scales before their first forward pass
    states = [getattr(module, "fp8_meta", {}).get("scaling_fwd") for module in model.modules()]
    return all(bool((state.scale == 1).all()) for state in states if state is not None)


def attach_delayed_scaling(decoder: torch.nn.Module) -> DelayedScaling | None:
    """Returns the scales of the decoder's emulated layers, newly attached; None where no layer has delayed scaling."""
    layers = [module for module in decoder.modules() if isinstance(module, Fp8Linear)]
    if not layers or layers[0].fp8.recipe != "delayed":
        return None
    scaling = DelayedScaling(layers, layers[0].fp8)
    scaling.attach(decoder)
    return scaling

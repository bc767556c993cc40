"""The emulated linear layer against products written out by hand, and the rules of Megatron's settings."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from aer_megatron.actor.fp8_emulation import (
    DelayedScaling,
    Fp8ColumnParallelLinear,
    Fp8Emulation,
    Fp8Linear,
    fp8_settings,
)
from aer_megatron.actor.layers import check_fp8, token_multiple
from aer_megatron.convert.fp8_quantize import E4M3, E5M2

K, N, M = 160, 144, 200  # no multiple of a block


class Bare(Fp8Linear):
    """An emulated layer without Megatron's part."""

    def __init__(self, fp8: Fp8Emulation, weight: Tensor) -> None:
        super().__init__(fp8=fp8)
        self.weight = torch.nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_impl(
            x, self.weight, bias=None, allreduce_dgrad=False, sequence_parallel=False, tp_group=None
        )


def settings(recipe: str, gradient_dtype: torch.dtype = E5M2, **changes: Any) -> Fp8Emulation:
    plain = Fp8Emulation(recipe, gradient_dtype, margin=0, amax_history_len=1, amax_compute_algo="most_recent")
    return dataclasses.replace(plain, **changes)


def by_loop(x: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Rounds block by block with power-of-two scales, written for clarity."""
    largest = torch.finfo(dtype).max
    result = torch.zeros_like(x)
    for i in range(0, x.shape[0], block[0]):
        for j in range(0, x.shape[1], block[1]):
            part = x[i : i + block[0], j : j + block[1]]
            inverse = 2.0 ** torch.ceil(torch.log2(part.abs().max().double() / largest)).item()
            result[i : i + block[0], j : j + block[1]] = (part / inverse).to(dtype).float() * inverse
    return result


def by_tensor(x: Tensor, dtype: torch.dtype) -> Tensor:
    scale = torch.tensor(torch.finfo(dtype).max).div(x.abs().max())
    return (x * scale).to(dtype).float() * scale.reciprocal()


def operands(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, weight, grad = (torch.randn(*shape, generator=generator) for shape in ((M, K), (N, K), (M, N)))
    return x, weight * 0.02, grad * 1e-4


@pytest.mark.parametrize(
    ("recipe", "input_block", "weight_block"),
    [("blockwise", 128, (128, 128)), ("mxfp8", 32, (1, 32)), ("tensorwise", 0, (0, 0))],
)
@pytest.mark.parametrize("gradient_dtype", [E4M3, E5M2])
def test_products_are_those_of_the_rounded_operands(
    recipe: str, input_block: int, weight_block: tuple[int, int], gradient_dtype: torch.dtype
) -> None:
    """Operands are rounded along the axis that is summed over, in the format of their pass."""
    x, weight, grad = operands()
    if recipe == "tensorwise":
        x_k = x_m = by_tensor(x, E4M3)
        w_k = w_n = by_tensor(weight, E4M3)
        g_n = g_m = by_tensor(grad, gradient_dtype)
    else:
        along, across = (1, input_block), (input_block, 1)
        x_k, x_m = by_loop(x, along, E4M3), by_loop(x, across, E4M3)
        w_k = by_loop(weight, weight_block, E4M3)
        w_n = by_loop(weight, weight_block[::-1], E4M3)
        g_n, g_m = by_loop(grad, along, gradient_dtype), by_loop(grad, across, gradient_dtype)
    layer = Bare(settings(recipe, gradient_dtype), weight)
    leaf = x.view(20, 10, K).requires_grad_()
    y = layer(leaf)
    y.backward(grad.view(20, 10, N))
    assert leaf.grad is not None and layer.weight.grad is not None
    torch.testing.assert_close(y.view(M, N), x_k @ w_k.t(), rtol=0, atol=1e-6)
    torch.testing.assert_close(leaf.grad.view(M, K), g_n @ w_n, rtol=0, atol=1e-9)
    torch.testing.assert_close(layer.weight.grad, g_m.t() @ x_m, rtol=0, atol=1e-8)


def test_gradient_is_straight_through_to_within_the_rounding() -> None:
    x, weight, grad = operands()
    for recipe in ("tensorwise", "blockwise", "mxfp8"):
        layer = Bare(settings(recipe), weight)
        leaf = x.clone().requires_grad_()
        layer(leaf).backward(grad)
        assert leaf.grad is not None and layer.weight.grad is not None
        for got, exact in ((leaf.grad, grad @ weight), (layer.weight.grad, grad.t() @ x)):
            error = (got - exact).norm() / exact.norm()
            assert 0.005 < error < 0.08, (recipe, error)  # e5m2 rounds by 4 %, e4m3 by 2 %


def test_bf16_products_are_added_in_fp32_and_rounded_once() -> None:
    x, weight, _ = (tensor.bfloat16() for tensor in operands())
    layer = Bare(settings("blockwise"), weight)
    expected = by_loop(x.float(), (1, 128), E4M3) @ by_loop(weight.float(), (128, 128), E4M3).t()
    y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected.bfloat16(), rtol=0, atol=0)


class Stack(torch.nn.Module):
    """Two delayed layers, the second one recomputed in the backward pass where ``recompute`` says so."""

    def __init__(self, fp8: Fp8Emulation, *, recompute: bool) -> None:
        super().__init__()
        _, weight, _ = operands()
        self.layers = torch.nn.ModuleList([Bare(fp8, weight), Bare(fp8, weight[:, :N] * 0.5)])
        self.recompute = recompute
        self.scaling = DelayedScaling(list(self.layers), fp8)  # type: ignore[arg-type]
        self.scaling.attach(self)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layers[0](x)
        if self.recompute:
            return torch.utils.checkpoint.checkpoint(self.layers[1], hidden, use_reentrant=True)  # type: ignore[no-any-return]
        return self.layers[1](hidden)  # type: ignore[no-any-return]


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    class Alone:
        def size(self) -> int:
            return 1

    monkeypatch.setattr("aer_megatron.actor.fp8_emulation.parallel_state.get_amax_reduction_group", lambda **_: Alone())


@pytest.mark.usefixtures("one_rank")
def test_delayed_scales_move_after_forward_and_backward_passes_with_gradients() -> None:
    stack = Stack(settings("delayed"), recompute=False)
    first = stack.layers[0]
    x, weight, _ = operands()
    first_scale = torch.tensor([448.0 / x.abs().max().item(), 448.0 / weight.abs().max().item()])
    with torch.no_grad():
        before = stack(x)
    assert first.fp8_scale_forward.tolist() == [1.0, 1.0]
    torch.testing.assert_close(first.fp8_amax_history_forward[0], 448.0 / first_scale)
    y = stack(0.5 * x)
    # the pass without gradients counts: its amax is the larger one
    torch.testing.assert_close(first.fp8_scale_forward, first_scale)
    assert first.fp8_amax_history_forward.abs().max() == 0
    assert first.fp8_scale_backward.tolist() == [1.0]
    y.backward(torch.full_like(y, 2.0))
    assert stack.layers[1].fp8_scale_backward.item() == 57344.0 / 2
    assert not torch.equal(before, stack(x))  # other scales, another rounding


@pytest.mark.usefixtures("one_rank")
def test_recomputation_sees_the_scales_of_its_pass_and_counts_once() -> None:
    """Two micro-batches forward, then two backward, as a pipeline runs them: with and without recomputation."""
    results = []
    for recompute in (False, True):
        stack = Stack(settings("delayed", amax_history_len=4, amax_compute_algo="max"), recompute=recompute)
        outputs = []
        for seed in range(3):
            x, _, _ = operands(seed)
            outputs.append(stack((x * (1 + seed)).requires_grad_()))
        assert stack.scaling.num_kept() == (3 if recompute else 0)
        for y in outputs:
            y.backward(torch.ones_like(y) * 1e-3)
        assert stack.scaling.num_kept() == 0
        results.append([*outputs, *(p.grad for p in stack.parameters()), *stack.state_dict().values()])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


class FakeConfig:
    """The fields of TransformerConfig that are read."""

    fp8: str | None = None
    fp8_recipe = "delayed"
    fp8_margin = 1
    fp8_amax_history_len = 8
    fp8_amax_compute_algo = "max"
    fp8_dot_product_attention = fp8_multi_head_attention = tp_only_amax_red = first_last_layers_bf16 = False
    num_layers_at_start_in_bf16 = 1
    num_layers_at_end_in_bf16 = 2


def fake_config(**changes: Any) -> Any:
    config = FakeConfig()
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def test_settings_are_taken_from_megatrons_fields() -> None:
    taken = fp8_settings("hybrid", fake_config())
    assert taken == Fp8Emulation("delayed", E5M2, 1, 8, "max", False, 0, 0)
    assert taken.describe() == (
        "FP8 emulated on CPU: recipe delayed, e4m3 forward, e5m2 gradients, amax history 8 (max), margin 1; "
        "matrix products in fp32 on the rounded values"
    )
    kept = fp8_settings("e4m3", fake_config(fp8_recipe="blockwise", first_last_layers_bf16=True))
    assert (kept.gradient_dtype, kept.layers_at_start, kept.layers_at_end) == (E4M3, 1, 2)
    assert kept.describe() == (
        "FP8 emulated on CPU: recipe blockwise, e4m3 forward, e4m3 gradients, 1 first and 2 last layers in high "
        "precision; matrix products in fp32 on the rounded values"
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fp8_recipe", "custom"),
        ("fp8_dot_product_attention", True),
        ("fp8_multi_head_attention", True),
    ],
)
def test_what_has_no_emulation_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"megatron.{name}={value!r}"):
        fp8_settings("hybrid", fake_config(**{name: value}))


def test_combinations_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="first_last_layers_bf16"):
        fp8_settings("hybrid", fake_config(first_last_layers_bf16=True))
    with pytest.raises(ValueError, match="use hybrid or e4m3"):
        fp8_settings("e5m2", fake_config())


def test_options_that_nothing_follows_are_refused_on_every_device() -> None:
    for name, value in (("fp8_param", True), ("fp8_wgrad", False)):
        with pytest.raises(ValueError, match=f"megatron.{name}"):
            check_fp8({"fp8": "hybrid", name: value})
    check_fp8({"fp8": "hybrid", "fp8_param": False, "fp8_wgrad": True})


def test_micro_batches_are_padded_for_transformer_engines_products_only() -> None:
    assert token_multiple(fake_config(fp8="hybrid")) == 16
    assert token_multiple(fake_config(fp8="e4m3", fp8_recipe="mxfp8")) == 32
    assert token_multiple(fake_config(fp8=None)) == 1  # emulated: torch's products take any size


def test_column_layer_puts_the_emulation_before_megatrons_product() -> None:
    order = [base.__name__ for base in Fp8ColumnParallelLinear.__mro__]
    assert order.index("Fp8Linear") < order.index("ColumnParallelLinear")


def test_fp8_is_refused_on_a_device_without_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    from aer_megatron.actor import model

    monkeypatch.setattr(model.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(model, "has_transformer_engine", lambda: False)
    with pytest.raises(ValueError, match=r"megatron\.fp8='hybrid' needs TransformerEngine"):
        model._checked_passthrough({"fp8": "hybrid"}, {})
    monkeypatch.setattr(model, "has_transformer_engine", lambda: True)
    assert model._checked_passthrough({"fp8": "hybrid"}, {}) == {"fp8": "hybrid"}

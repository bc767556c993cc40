"""Our actor on Megatron-Core's TransformerEngine layers, without a GPU: names, weights, numbers, FP8, checkpoints.

Runs where the pure-Python wheel of transformer-engine is installed and no CUDA device is, and skips elsewhere
(docs/evidence/gpu-sources.md says how to get it). TransformerEngine's and Megatron-Core's Python are the real ones, the
compiled kernels are those of tests/support/te_on_cpu.py: this shows the wiring, never TransformerEngine's kernels.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from aer_megatron.convert.hf_config import architecture_from_hf_config
from aer_megatron.convert.mapping import find_row, hf_names, megatron_names, shard_shape
from tests.support import actor_snapshots, layout_matrix, te_on_cpu, tiny_models
from tests.support.layout_matrix import Layout, Variant, differences
from tests.support.policies import build_actor, build_topology, fixed_batch, policy_config
from tests.support.spawn import run_distributed

if importlib.util.find_spec("transformer_engine") is None:
    pytest.skip("transformer-engine's Python is not installed (docs/evidence/gpu-sources.md)", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("a device is here: TransformerEngine itself runs", allow_module_level=True)
if "megatron.core" in sys.modules:
    pytest.skip("needs a process of its own: run this file alone", allow_module_level=True)

UNFUSED = {"attention_backend": "unfused"}  # the one of TransformerEngine's attentions that is PyTorch
REFERENCE = "transformer_engine.pytorch.custom_recipes.reference_current_scaling.current_scaling_ref_factory"
FP8_REFERENCE = {"fp8": "hybrid", "fp8_recipe": "custom", "fp8_quantizer_factory": REFERENCE}
FP8_EMULATED = {"fp8": "hybrid", "fp8_recipe": "tensorwise"}
EXPERTS = Layout(experts=True, tied=False)
FAMILIES = [("qwen3", False), ("qwen2", True), ("llama", True), ("qwen3_moe", False)]


@pytest.fixture(scope="module", autouse=True)
def _platform() -> Iterator[None]:
    te_on_cpu.install()
    from aer_megatron.parallel.platform import initialize_process_group, install_platform

    torch.set_num_threads(1)
    initialize_process_group(install_platform())
    yield
    torch.distributed.destroy_process_group()


@contextlib.contextmanager
def options(megatron: dict[str, Any], *, token_multiple: int | None = None, model: Any = None) -> Iterator[None]:
    """Has ``layout_matrix.update`` run with entries of [megatron], another model, or tokens padded as for FP8."""
    config = functools.partial(policy_config, megatron=UNFUSED | megatron)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(layout_matrix, "policy_config", config))
        if model is not None:
            stack.enter_context(mock.patch.object(layout_matrix, "tiny_hf_model", lambda **_: model))
        if token_multiple is not None:
            name = "aer_megatron.actor.forward.token_multiple"
            stack.enter_context(mock.patch(name, lambda config: token_multiple))
        yield


def tiny_checkpoint(family: str, tied: bool, folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """Returns the architecture and the tensors of a random model, written and read by transformers' conventions."""
    config_type, model_type, changes = tiny_models.FAMILIES[family]
    settings = {**changes, "tie_word_embeddings": tied}
    with mock.patch.dict(tiny_models.FAMILIES, {family: (config_type, model_type, settings)}):
        tiny_models.save_tiny_model(family, folder)
    arch = architecture_from_hf_config(AutoConfig.from_pretrained(folder).to_dict())
    return arch, load_file(folder / "model.safetensors")


def check_modules(decoder: Any, arch: Any) -> None:
    """Returns nothing; fails where a module is not the one that TransformerEngine has for it."""
    import transformer_engine.pytorch as te

    layer = decoder.layers[0]
    attention, mlp = layer.self_attention, layer.mlp.experts if arch.moe else layer.mlp
    expected = {
        attention.linear_qkv: te.LayerNormLinear,
        attention.core_attention: te.DotProductAttention,
        attention.linear_proj: te.Linear,
        mlp.linear_fc1: te.GroupedLinear if arch.moe else te.LayerNormLinear,
        mlp.linear_fc2: te.GroupedLinear if arch.moe else te.Linear,
        decoder.final_layernorm: te.RMSNorm,
    }
    norms = [attention.q_layernorm, attention.k_layernorm] if arch.qk_norm else []
    norms += [layer.pre_mlp_layernorm] if arch.moe else []
    expected |= dict.fromkeys(norms, te.RMSNorm)
    assert [type(module).__name__ for module, wanted in expected.items() if not isinstance(module, wanted)] == []


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_weights_pass_through_te_modules_bit_for_bit(family: str, tied: bool, tmp_path: Path) -> None:
    """The modules have the parameters of the conversion tables by name and shape, and their keys in checkpoints."""
    from aer_megatron.actor.actor import model_options
    from aer_megatron.actor.model import build_chunks, named_weights
    from aer_megatron.actor.weights import has_te_names, iter_hf_weights, load_hf_weights

    arch, tensors = tiny_checkpoint(family, tied, tmp_path)
    config = policy_config(megatron=UNFUSED)
    topology = build_topology(config)
    with te_on_cpu.layer_specs(te=True):
        chunks = build_chunks(arch, model_options(config), topology)
    check_modules(chunks[0].decoder, arch)
    assert has_te_names(chunks)
    names = megatron_names(arch, range(arch.num_layers), first_stage=True, last_stage=True, te_spec=True)
    padded = int(chunks[0].vocab_size)
    expected = {name: shard_shape(arch, name, tp_size=1, padded_vocab=padded) for name in names}
    assert {name: tuple(parameter.shape) for name, parameter in named_weights(chunks)} == expected

    stored = {value.key for value in chunks[0].sharded_state_dict().values() if hasattr(value, "key")}
    rows = [find_row(arch, name)[0] for name in names]
    assert [row.stored_keys for row in rows if not stored.intersection(row.stored_keys)] == []

    load_hf_weights(chunks, arch, topology, tensors.__getitem__)
    back = dict(iter_hf_weights(chunks, arch, topology, bucket_bytes=10**5))
    assert back.keys() == hf_names(arch).keys()
    for name, tensor in back.items():
        assert torch.equal(tensor, tensors[name]), name


def both(
    layout: Layout, variant: Variant, te_options: dict[str, Any], local: dict[str, Any], **choices: Any
) -> list[dict[str, Any]]:
    """Returns the update of an actor with TransformerEngine's layers and of one with the local layers."""
    topology = build_topology(policy_config(parallel=layout.parallel()))
    exact = choices.pop("exact_attention", False)
    with te_on_cpu.layer_specs(te=True, exact_attention=exact), options(te_options, **choices):
        found = layout_matrix.update(layout, variant, topology)
    with te_on_cpu.layer_specs(te=False), options(local, **choices), te_on_cpu.torch_adam():
        return [found, layout_matrix.update(layout, variant, topology)]


def tiny_qwen2() -> Any:
    """Returns a model with biases in its attention."""
    config_type, model_type, _ = tiny_models.FAMILIES["qwen2"]
    torch.manual_seed(0)
    model = model_type(config_type(**tiny_models.SIZES, tie_word_embeddings=True)).float().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize(
    ("layout", "variant", "model"),
    [
        (Layout(), Variant(), None),
        (Layout(tied=False), Variant(packed=True, micro_batches=3), None),
        (Layout(), Variant(micro_batches=3), tiny_qwen2),
        (EXPERTS, Variant(packed=True), None),
    ],
    ids=["tied", "untied, packed", "biases", "experts, packed"],
)
def test_an_update_is_that_of_the_local_layers(layout: Layout, variant: Variant, model: Any) -> None:
    """Scores, loss, the gradient of every tensor and the weights after FusedAdam's step, fp32 without FP8."""
    found, expected = both(layout, variant, {}, {}, model=model() if model else None)
    assert differences(found, expected, rtol=1e-5) == []


@pytest.mark.parametrize(
    ("layout", "variant", "model"),
    [
        (Layout(dtype="bf16"), Variant(), None),
        (Layout(dtype="bf16", tied=False), Variant(packed=True, micro_batches=3), None),
        (replace(EXPERTS, dtype="bf16"), Variant(), None),
        (Layout(dtype="bf16"), Variant(), tiny_qwen2),
    ],
    ids=["tied", "untied, packed", "experts", "biases"],
)
def test_emulated_fp8_is_te_s_reference_quantizer_bit_for_bit(layout: Layout, variant: Variant, model: Any) -> None:
    """Scores and the gradient of every tensor under current scaling, hybrid format, ragged sequences.

    Both sides see the same padding, the same attention and products that are rounded once.
    """
    choices = {"exact_attention": True, "token_multiple": 16, "model": model() if model else None}
    with te_on_cpu.ExactProducts() as products:
        found, expected = both(layout, variant, FP8_REFERENCE, FP8_EMULATED, **choices)
        assert products.num_scaled >= 4 * 4 * 2  # a score and an update, of four linears in two layers at least
        topology = build_topology(policy_config())
        with te_on_cpu.layer_specs(te=False), options({}, token_multiple=16, model=choices["model"]):
            plain = layout_matrix.update(layout, variant, topology)
    for kind in ("logprob", "entropy"):
        np.testing.assert_array_equal(found[kind], expected[kind])
    for name, tensor in expected["gradients"].items():
        np.testing.assert_array_equal(found["gradients"][name], tensor, err_msg=name)
    assert np.abs(found["logprob"] - plain["logprob"]).max() > 0.1  # FP8 was on
    assert layout_matrix.gradient_distance(found, plain) > 0.1


@pytest.mark.parametrize("megatron", [{}, FP8_REFERENCE], ids=["no fp8", "fp8"])
def test_recomputed_activations_change_no_bit(megatron: dict[str, Any]) -> None:
    """Whole layers are computed again in the backward pass; under FP8 by TransformerEngine's own function."""
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    layout, variant = Layout(dtype="bf16"), Variant(packed=True, micro_batches=3)
    topology = build_topology(policy_config())
    results = []
    for table in (megatron, megatron | recompute):
        with te_on_cpu.layer_specs(te=True), options(table):
            results.append(layout_matrix.update(layout, variant, topology))
    for kind in ("gradients", "weights"):
        for name, tensor in results[0][kind].items():
            np.testing.assert_array_equal(results[1][kind][name], tensor, err_msg=f"{kind} of {name}")


def scores_after_a_step(te: bool, fp8: dict[str, Any], num_micro_batches: int = 3) -> tuple[Any, Any]:
    """Returns log-probabilities before and after one optimizer step of a tiny bf16 policy under FP8."""
    batch = fixed_batch()
    size = len(batch.advantage_B) // num_micro_batches
    config = policy_config(model={"dtype": "bf16"}, parallel={"micro_batch_size": size}, megatron=UNFUSED | fp8)
    with te_on_cpu.layer_specs(te=te, exact_attention=True), options({}, token_multiple=16):
        actor = build_actor(config)
        before = actor.score(batch.experience).logprob_T
        actor.train(batch, seed=0, entropy_gradient=True)
        return before, actor.score(batch.experience).logprob_T


def test_no_fp8_copy_of_the_weights_survives_a_step() -> None:
    """Megatron's schedules tell TransformerEngine of the first micro-batch, through our wrappers; else it reuses."""
    with te_on_cpu.ExactProducts():
        before, after = scores_after_a_step(True, FP8_REFERENCE)
        before_emulated, after_emulated = scores_after_a_step(False, FP8_EMULATED)
        with mock.patch("megatron.core.transformer.module.MegatronModule.set_is_first_microbatch"):
            _, stale = scores_after_a_step(True, FP8_REFERENCE)
    np.testing.assert_array_equal(before, before_emulated)
    np.testing.assert_array_equal(after, after_emulated)
    assert np.abs(after - before).max() > 0.05
    assert np.abs(stale - after).max() > 0.01


def test_two_ranks_with_te_layers_give_the_numbers_of_one(tmp_path: Path) -> None:
    """Tensor and sequence parallelism, two pipeline stages, two replicas, expert parallelism, fp32."""
    layouts = [Layout(tp=2, sequence_parallel=True), Layout(pp=2, tied=False), Layout(), replace(EXPERTS, ep=2)]
    found = run_distributed(te_on_cpu.updates_on_ranks, 2, layouts, UNFUSED, timeout_s=300)[0]
    for layout, result in zip(layouts, found, strict=True):
        topology = build_topology(policy_config())
        with te_on_cpu.layer_specs(te=False), options({}), te_on_cpu.torch_adam():
            expected = layout_matrix.update(layout_matrix.whole(layout), Variant(), topology)
        assert differences(result, expected, rtol=1e-5) == [], layout


def trained(actor: Any, seeds: range) -> list[float]:
    """Returns the gradient norms of updates on one batch for each seed."""
    return [actor.train(fixed_batch(seed=seed), seed=seed, entropy_gradient=True).grad_norm for seed in seeds]


@pytest.mark.parametrize("megatron", [{}, FP8_REFERENCE], ids=["no fp8", "fp8"])
def test_a_resumed_run_with_fused_adam_is_the_straight_one(megatron: dict[str, Any], tmp_path: Path) -> None:
    """Bit for bit, bf16; the local layers with torch's AdamW read the same checkpoint."""
    from aer_megatron.checkpoint.store import CheckpointStore

    def policy(table: dict[str, Any]) -> tuple[Any, Any]:
        actor = build_actor(policy_config(model={"dtype": "bf16"}, megatron=UNFUSED | table))
        return actor, CheckpointStore(tmp_path, topology=actor.topology, device=torch.device("cpu"), keep=1)

    with te_on_cpu.layer_specs(te=True):
        actor, store = policy(megatron)
        trained(actor, range(2))
        checkpoint = store.save(actor, step=2, state={}, files={})
        saved = actor_snapshots.snapshot(actor)
        weights = {name: tensor.clone() for name, tensor in actor.hf_weights()}
        straight, end = trained(actor, range(2, 4)), actor_snapshots.snapshot(actor)
        resumed, store = policy(megatron)
        store.load(checkpoint, resumed)
        assert actor_snapshots.differences(saved, actor_snapshots.snapshot(resumed)) == []
        assert trained(resumed, range(2, 4)) == straight
        assert actor_snapshots.differences(end, actor_snapshots.snapshot(resumed)) == []
    with te_on_cpu.layer_specs(te=False), te_on_cpu.torch_adam():
        local, store = policy({})
        store.load(checkpoint, local)
        assert actor_snapshots.differences(weights, dict(local.hf_weights())) == []
        if not megatron:
            np.testing.assert_allclose(trained(local, range(2, 4)), straight, rtol=0.05)


def test_te_refuses_ragged_tokens_that_are_not_padded() -> None:
    """What the padding of micro-batches is for: each sequence is one by itself."""
    topology = build_topology(policy_config())
    with (
        te_on_cpu.layer_specs(te=True),
        options(FP8_REFERENCE, token_multiple=1),
        pytest.raises(ValueError, match="divisible by 8"),
    ):
        layout_matrix.update(Layout(), Variant(micro_batches=12), topology)

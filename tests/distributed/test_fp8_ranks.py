"""Emulated FP8 in the whole actor: layouts agree as far as their scales do, recomputation and a resume change no bit.

One process and then two run all their scenarios once; the tests look at what came back.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from aer_megatron.parallel.platform import install_platform
from tests.support.policies import build_actor, build_topology, fixed_batch, policy_config
from tests.support.spawn import run_distributed
from tests.support.tiny_models import save_tiny_model

DELAYED = {"fp8": "hybrid", "fp8_recipe": "delayed", "fp8_amax_history_len": 4, "fp8_amax_compute_algo": "max"}
RECIPES: dict[str, dict[str, Any]] = {
    "none": {},
    "delayed": DELAYED,
    "tensorwise": {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
    "blockwise": {"fp8": "e4m3", "fp8_recipe": "blockwise"},
    "mxfp8": {"fp8": "e4m3", "fp8_recipe": "mxfp8"},
}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
FIRST_KEPT = {"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 0}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tp": 2},
    "tp2-sp": {"tp": 2, "sequence_parallel": True},
    "pp2": {"pp": 2},
}


def _actor(megatron: dict[str, Any], **parallel: Any) -> Any:
    return build_actor(policy_config(megatron=megatron, parallel=parallel))


def _two_updates(actor: Any) -> dict[str, Any]:
    """Scores, updates twice and scores again; the controller's H_0 would be the first scores' entropy."""
    batch = fixed_batch()
    before = actor.score(batch.experience)
    norms = [actor.train(batch, seed=seed, entropy_gradient=True).grad_norm for seed in range(2)]
    after = actor.score(batch.experience)
    buffers = {name: value.clone() for name, value in actor.model.named_buffers() if "fp8" in name}
    scores = [torch.from_numpy(x) for x in (before.logprob_T, before.token_entropy_T, after.logprob_T)]
    return {"scores": scores, "norms": norms, "buffers": buffers}


def _resume(folder: Path) -> list[str]:
    """Returns the names of tensors in which a resumed run differs from one that was never interrupted."""
    from aer_megatron.checkpoint.store import CheckpointStore

    straight = _actor(DELAYED)
    _two_updates(straight)
    store = CheckpointStore(folder, topology=straight.topology, device=torch.device("cpu"), keep=1)
    store.save(straight, step=1, state={}, files={})
    expected = _two_updates(straight)
    resumed = _actor(DELAYED)
    checkpoint = store.latest()
    assert checkpoint is not None
    store.load(checkpoint, resumed)
    got = _two_updates(resumed)
    one, other = straight.model.state_dict(), resumed.model.state_dict()
    differing = [name for name in one if torch.is_tensor(one[name]) and not torch.equal(one[name], other[name])]
    same_scores = all(torch.equal(a, b) for a, b in zip(expected["scores"], got["scores"], strict=True))
    return differing + ([] if same_scores and expected["norms"] == got["norms"] else ["scores"])


def _mean_ratio(seed: int | None) -> float:
    """Returns the mean probability ratio of two updates that move nothing, under scores that were cut by ``seed``."""
    still = {"lr": 1e-30, "weight_decay": 0.0}  # the smallest step: no fp32 weight moves
    actor = build_actor(policy_config(megatron=RECIPES["tensorwise"], optimizer=still, algo={"num_minibatches": 2}))
    batch = fixed_batch()
    scored = dataclasses.replace(batch, old_logprob_T=actor.score(batch.experience, seed=seed).logprob_T)
    total, count = actor.train(scored, seed=3, entropy_gradient=True).sums["ratio"]
    return total / count


def _experts(folder: Path) -> dict[str, Any]:
    """Returns names of the emulated layers of a model with experts, and its statistics with and without FP8."""
    from aer_megatron.actor.actor import Actor
    from aer_megatron.actor.fp8_emulation import Fp8Linear
    from aer_megatron.compose.common import architecture
    from aer_megatron.convert.hf_folder import HFFolder

    save_tiny_model("qwen3_moe", folder)
    entropy = {}
    for recipe in ("none", "delayed"):
        config = policy_config(megatron=RECIPES[recipe])
        place = {"device": torch.device("cpu"), "optimizer": config.optimizer, "num_updates_planned": 10}
        actor = Actor(architecture(str(folder)), config, build_topology(config), **place)
        actor.load_hf_weights(HFFolder(str(folder)).get)
        entropy[recipe] = _two_updates(actor)["scores"][1].mean().item()
    names = [name for name, module in actor.model.named_modules() if isinstance(module, Fp8Linear)]
    return {"names": names, "entropy": entropy}


def _alone(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    from aer_megatron.actor.fp8_emulation import Fp8Linear

    install_platform()
    result: dict[str, Any] = {name: _two_updates(_actor(megatron)) for name, megatron in RECIPES.items()}
    result["recompute"] = _two_updates(_actor(DELAYED | RECOMPUTE))
    kept = _actor(RECIPES["tensorwise"] | FIRST_KEPT).model
    result["emulated"] = [name for name, module in kept.named_modules() if isinstance(module, Fp8Linear)]
    result["mean_ratio"] = {seed: _mean_ratio(seed) for seed in (3, 4, None)}
    result["resume"] = _resume(folder / "checkpoints")
    result["experts"] = _experts(folder / "experts")
    return result


def _together(rank: int, world_size: int) -> dict[str, Any]:
    install_platform()
    recipes = {"tp2": RECIPES, "tp2-sp": {"delayed": DELAYED}, "pp2": {"delayed": DELAYED}}
    return {
        name: {recipe: _two_updates(_actor(megatron, **layout)) for recipe, megatron in recipes[name].items()}
        for name, layout in LAYOUTS.items()
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    result: dict[str, Any] = run_distributed(_alone, 1, tmp_path_factory.mktemp("checkpoints"), timeout_s=300)[0]
    return result


@pytest.fixture(scope="module")
def together() -> list[dict[str, Any]]:
    return run_distributed(_together, 2, timeout_s=300)


def _distance(one: dict[str, Any], other: dict[str, Any]) -> list[float]:
    return [float((a - b).abs().mean()) for a, b in zip(one["scores"], other["scores"], strict=True)]


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "none"])
def test_fp8_is_noise_around_the_exact_policy(alone: dict[str, Any], recipe: str) -> None:
    logprob, entropy, _ = _distance(alone[recipe], alone["none"])
    assert 0.01 < logprob < 0.3  # nats; it is no silent no-op either
    assert 0.005 < entropy < 0.1


def test_only_layers_that_are_not_kept_are_emulated_and_never_the_head(alone: dict[str, Any]) -> None:
    parts = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")
    assert sorted(alone["emulated"]) == sorted(f"decoder.layers.1.{part}" for part in parts)


def test_experts_are_emulated_and_the_router_is_not(alone: dict[str, Any]) -> None:
    names, entropy = alone["experts"]["names"], alone["experts"]["entropy"]
    assert sum(".experts." in name for name in names) == 2 * 4 * 2
    assert not [name for name in names if "router" in name]
    assert entropy["delayed"] != entropy["none"]
    assert entropy["delayed"] == pytest.approx(entropy["none"], rel=0.01)


def test_recomputation_changes_no_bit(alone: dict[str, Any]) -> None:
    plain, recomputed = alone["delayed"], alone["recompute"]
    assert plain["norms"] == recomputed["norms"]
    assert _distance(plain, recomputed) == [0.0, 0.0, 0.0]
    assert plain["buffers"].keys() == recomputed["buffers"].keys()
    assert all(torch.equal(plain["buffers"][name], recomputed["buffers"][name]) for name in plain["buffers"])


def test_resumed_run_is_the_straight_one(alone: dict[str, Any]) -> None:
    assert alone["resume"] == []


def test_scales_are_calibrated_before_the_first_scores(alone: dict[str, Any]) -> None:
    """H_0 comes from those scores; under scales of 1 most weights would be subnormal numbers."""
    exact = alone["none"]
    delayed, current = (_distance(alone[recipe], exact)[1] for recipe in ("delayed", "tensorwise"))
    assert delayed < 1.3 * current


@pytest.mark.parametrize("layout", LAYOUTS)
def test_delayed_scaling_rounds_shards_like_the_whole(
    alone: dict[str, Any], together: list[dict[str, Any]], layout: str
) -> None:
    """The amax is reduced over tensor-parallel ranks; what remains are roundings that fp32 sums tip over."""
    noise = _distance(alone["delayed"], alone["none"])
    for rank in together:
        distance = _distance(rank[layout]["delayed"], alone["delayed"])
        assert all(d < 0.1 * n for d, n in zip(distance, noise, strict=True)), (distance, noise)


def test_ratios_are_1_to_the_last_bit_where_scores_are_cut_like_the_updates(alone: dict[str, Any]) -> None:
    """A tensorwise scale is that of the micro-batch: another cut, as the other seeds make, is another rounding."""
    assert alone["mean_ratio"][3] == 1.0
    assert abs(alone["mean_ratio"][4] - 1.0) > 1e-4 and abs(alone["mean_ratio"][None] - 1.0) > 1e-4


def test_delayed_scales_are_the_same_on_all_tensor_parallel_ranks(
    alone: dict[str, Any], together: list[dict[str, Any]]
) -> None:
    first, second = (rank["tp2"]["delayed"]["buffers"] for rank in together)
    whole = alone["delayed"]["buffers"]
    assert first.keys() == whole.keys() and len(first) == 2 * 4 * 4
    for name, value in first.items():
        # row 0 of a history is the pass under way, which has not been reduced yet
        reduced = value[1:] if "history" in name else value
        other, alone_value = (v[name][1:] if "history" in name else v[name] for v in (second, whole))
        assert torch.equal(reduced, other)
        torch.testing.assert_close(reduced, alone_value, rtol=0.05, atol=0)


def test_other_recipes_scale_each_shard_by_itself_as_transformer_engine_does(
    alone: dict[str, Any], together: list[dict[str, Any]]
) -> None:
    for recipe in ("tensorwise", "blockwise", "mxfp8"):
        noise = _distance(alone[recipe], alone["none"])[0]
        distance = _distance(together[0]["tp2"][recipe], alone[recipe])[0]
        assert distance < 1.5 * noise
        if recipe == "tensorwise":
            assert distance > 0.1 * noise  # a reduced amax would make them equal
    assert _distance(together[0]["tp2"]["none"], alone["none"])[0] < 1e-5

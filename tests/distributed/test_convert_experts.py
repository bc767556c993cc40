"""Expert parallelism in training: the numbers of one rank, checkpoints that hold every expert, export from a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aer_megatron.checkpoint.weights import RunCheckpoint
from aer_megatron.convert.hf_folder import HFFolder
from aer_megatron.parallel.platform import install_platform
from tests.support.policies import fixed_batch, policy_config
from tests.support.spawn import run_distributed
from tests.support.tiny_models import save_tiny_model

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {},
    "ep2": {"ep": 2},
    "tp2": {"tp": 2, "sequence_parallel": True},
}


def _actor(model: Path, parallel: dict[str, Any]) -> Any:
    from aer_megatron.actor.actor import Actor
    from aer_megatron.convert.folders import checked_hf_folder
    from aer_megatron.parallel.topology import initialize_topology, leave_layout

    leave_layout()
    config = policy_config(parallel={**parallel, "micro_batch_size": 3})
    sizes = config.parallel
    topology = initialize_topology(tp=sizes.tp, pp=sizes.pp, ep=sizes.ep, seed=1)
    folder, arch = checked_hf_folder(model, sizes.tp)
    actor = Actor(
        arch, config, topology, device=torch.device("cpu"), optimizer=config.optimizer, num_updates_planned=10
    )
    actor.load_hf_weights(folder.get)
    return actor


def _weights(actor: Any) -> dict[str, Any]:
    return {name: tensor.numpy().copy() for name, tensor in actor.hf_weights()}


def _train(actor: Any, seeds: tuple[int, ...]) -> dict[str, Any]:
    steps = [actor.train(fixed_batch(seed=seed), seed=0, entropy_gradient=True) for seed in seeds]
    return {
        "sums": [dict(step.sums) for step in steps],
        "grad_norm": [step.grad_norm for step in steps],
        "weights": _weights(actor),
    }


def _whole(rank: int, world_size: int, model: Path) -> dict[str, Any]:
    install_platform()
    return _train(_actor(model, {}), (0, 1))


def _sharded(rank: int, world_size: int, model: Path, runs: Path) -> dict[str, Any]:
    install_platform()
    from aer_megatron.checkpoint.store import CheckpointStore

    results = {name: _train(_actor(model, parallel), (0, 1)) for name, parallel in LAYOUTS.items()}
    saved = _actor(model, LAYOUTS["ep2"])
    _train(saved, (0,))
    store = CheckpointStore(runs, topology=saved.topology, device=torch.device("cpu"), keep=2)
    store.save(saved, step=1, state={}, files={})
    for name in ("ep2", "dp2"):
        resumed = _actor(model, LAYOUTS[name])
        reader = CheckpointStore(runs, topology=resumed.topology, device=torch.device("cpu"), keep=2)
        reader.load(reader.latest(), resumed)
        results[f"resumed {name}"] = {"before": _weights(resumed), **_train(resumed, (1,))}
    return results


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("qwen3_moe", tmp_path_factory.mktemp("experts") / "hf")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(model: Path) -> dict[str, Any]:
    return run_distributed(_whole, 1, model, timeout_s=300)[0]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def sharded(model: Path, runs: Path) -> list[dict[str, Any]]:
    return run_distributed(_sharded, 2, model, runs, timeout_s=500)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_train_as_on_one_rank(layout: str, whole: dict[str, Any], sharded: list[dict[str, Any]]) -> None:
    for ranks in sharded:
        result = ranks[layout]
        np.testing.assert_allclose(result["grad_norm"], whole["grad_norm"], rtol=2e-5)
        for mine, theirs in zip(result["sums"], whole["sums"], strict=True):
            for name in theirs:
                np.testing.assert_allclose(mine[name], theirs[name], rtol=2e-5, atol=2e-5, err_msg=name)
        for name, tensor in whole["weights"].items():
            np.testing.assert_allclose(result["weights"][name], tensor, rtol=1e-4, atol=2e-5, err_msg=name)


def test_training_moves_every_expert(model: Path, whole: dict[str, Any]) -> None:
    source = HFFolder(model)
    experts = [name for name in source.names() if ".experts." in name]
    assert len(experts) == 2 * 4 * 3
    for name in experts:
        assert not np.array_equal(whole["weights"][name], source.get(name).numpy()), name


def test_a_run_resumes_bit_for_bit_and_in_another_layout(sharded: list[dict[str, Any]]) -> None:
    for ranks in sharded:
        straight, resumed = ranks["ep2"], ranks["resumed ep2"]
        assert resumed["grad_norm"] == straight["grad_norm"][1:]
        for name, tensor in straight["weights"].items():
            np.testing.assert_array_equal(resumed["weights"][name], tensor, err_msg=name)
            np.testing.assert_array_equal(ranks["resumed dp2"]["before"][name], resumed["before"][name], err_msg=name)
            np.testing.assert_allclose(ranks["resumed dp2"]["weights"][name], tensor, rtol=1e-4, atol=2e-5)


def test_every_expert_is_exported_from_a_run(model: Path, runs: Path, sharded: list[dict[str, Any]]) -> None:
    from aer_megatron.convert.folders import checked_hf_folder

    folder, arch = checked_hf_folder(model, 1)
    checkpoint = RunCheckpoint(runs / "step_00000001")
    expected = sharded[0]["resumed ep2"]["before"]
    found = dict(checkpoint.tensors(arch))
    assert sorted(found) == sorted(folder.names())
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor.numpy(), expected[name], err_msg=name)

"""An update that is not finite: found on every rank, named, and left out without a trace."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch.distributed as dist

from aer_megatron.parallel.platform import install_platform
from tests.support.nonfinite_faults import ACTOR_FAULTS, BATCH_FAULTS, NAN_WEIGHT, NORM_WEIGHT, SEQUENCE, update_with
from tests.support.policies import build_actor, fixed_batch, policy_config
from tests.support.spawn import run_distributed

LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "dp2": {},
    "sp2": {"tp": 2, "sequence_parallel": True},
    "packed": {"tokens_per_micro_batch": 2048},
}
FAULTS = [*ACTOR_FAULTS, *BATCH_FAULTS]
CASES = [(layout, fault) for layout in LAYOUTS for fault in FAULTS]
HF_NAME = "model.layers.1.mlp.down_proj.weight"


def _all_faults(rank: int, world_size: int, layouts: list[str]) -> dict[tuple[str, str], Any]:
    install_platform()
    return {(name, fault): update_with(fault, rank, LAYOUTS[name]) for name in layouts for fault in FAULTS}


@pytest.fixture(scope="module")
def seen() -> dict[tuple[str, str], list[dict[str, Any]]]:
    """(layout, fault) -> what each rank saw."""
    alone = run_distributed(_all_faults, 1, ["one"], timeout_s=600)
    together = run_distributed(_all_faults, 2, [name for name in LAYOUTS if name != "one"], timeout_s=600)
    return {case: [of_rank[case] for of_rank in (alone if case[0] == "one" else together)] for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=["-".join(case) for case in CASES])
def test_all_ranks_say_the_same_and_nothing_moves(case: tuple[str, str], seen: Any) -> None:
    first = seen[case][0]
    for of_rank in seen[case]:
        assert of_rank["diagnoses"] == first["diagnoses"]
        assert of_rank["stopped"] == first["stopped"]
        assert of_rank["moved"] == []
        assert (of_rank["skipped"], of_rank["num_updates"]) == (1, 1)
        assert of_rank["sums"]["policy_loss"] == (0.0, 0.0)
        assert of_rank.get("after") == of_rank.get("expected_after")
    assert len(first["diagnoses"]) == 1


def _cause(case: tuple[str, str], seen: Any) -> tuple[Any, str]:
    diagnosis = seen[case][0]["diagnoses"][0]
    return diagnosis.findings[0], diagnosis.text()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_nan_weight_is_named_with_its_rank_and_layer(layout: str, seen: Any) -> None:
    cause, text = _cause((layout, "nan weight"), seen)
    assert (cause.kind, cause.tensor, cause.value, cause.count, cause.layer) == ("parameter", NAN_WEIGHT, "nan", 1, 1)
    assert cause.owner.rank == len(seen[layout, "nan weight"]) - 1
    assert HF_NAME in text
    assert text in seen[layout, "nan weight"][0]["stopped"]
    later = {finding.kind: finding for finding in seen[layout, "nan weight"][0]["diagnoses"][0].findings}
    assert later["activation"].tensor == "decoder.layers.1.mlp.linear_fc2"
    assert later["score"].places
    assert later["score"].places[0].token is not None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_is_named_with_its_rank_layer_and_micro_batch(layout: str, seen: Any) -> None:
    cause, text = _cause((layout, "inf gradient"), seen)
    assert (cause.kind, cause.tensor, cause.layer, cause.micro_batch) == ("gradient", NAN_WEIGHT, 1, 0)
    assert cause.owner.rank == len(seen[layout, "inf gradient"]) - 1
    assert cause.places
    assert HF_NAME in text


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_that_the_global_norm_leaves_out_is_seen(layout: str, seen: Any) -> None:
    cause, _ = _cause((layout, "gradient of a copy"), seen)
    assert (cause.kind, cause.tensor) == ("gradient", NORM_WEIGHT)
    assert cause.owner.rank == len(seen[layout, "gradient of a copy"]) - 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_fault_that_does_not_repeat_is_named_and_called_so(layout: str, seen: Any) -> None:
    cause, text = _cause((layout, "once"), seen)
    assert (cause.kind, cause.tensor) == ("first_gradient", NAN_WEIGHT)
    assert "comes and goes" in text


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_overflow_is_named_by_the_first_module_that_has_it(layout: str, seen: Any) -> None:
    cause, _ = _cause((layout, "bf16 overflow"), seen)
    assert (cause.kind, cause.tensor, cause.layer) == ("activation_input", "decoder.layers.1.mlp.linear_fc2", 1)
    assert cause.value in ("inf", "-inf")
    assert cause.places


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fault", BATCH_FAULTS)
def test_a_bad_value_of_the_batch_is_named_with_its_sample(layout: str, fault: str, seen: Any) -> None:
    tensor = {
        "nan advantage": "advantage_B",
        "nan rollout logprob": "rollout_logprob_T",
        "nan old logprob": "old_logprob_T",
        "giant advantage": "advantage_B",
        "overflow in the loss": "total, policy_loss",
    }[fault]
    cause, text = _cause((layout, fault), seen)
    assert cause.tensor == tensor
    assert [place.sequence for place in cause.places] == [SEQUENCE]
    assert f"sequence {SEQUENCE} (prompt 0x{SEQUENCE:x}, group {SEQUENCE}, sample 0)" in text


def _collectives(rank: int, world_size: int, layout: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Returns the collectives of a good update, and those of Megatron's own sequence of calls."""
    install_platform()
    called: list[str] = []
    names = ["all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast", "all_gather", "barrier"]

    def counted(name: str) -> Any:
        original = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            called.append(name)
            return original(*args, **kwargs)

        return mock.patch.object(dist, name, call)

    def run(megatrons: bool) -> list[str]:
        actor, batch = build_actor(policy_config(parallel=layout)), fixed_batch()
        update = next(actor._all_updates(batch, seed=0, entropy_gradient=True))
        called.clear()
        for patch in patches:
            patch.start()
        if megatrons:
            actor._updates._forward_backward(update)
            actor.optimizer.step()
        else:
            actor._updates.make([update], batch.experience, lambda diagnosis: None, always=())
        for patch in patches:
            patch.stop()
        return list(called)

    patches = [counted(name) for name in names]
    return run(False), run(True)


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}, {}])
def test_a_good_update_costs_no_collective_more_than_megatrons_own_step(layout: dict[str, Any]) -> None:
    for ours, megatrons in run_distributed(_collectives, 2, layout, timeout_s=300):
        assert ours == megatrons
        assert ours


def _good_weights(rank: int, world_size: int) -> list[list[np.ndarray[Any, Any]]]:
    """Returns the weights after three updates as this project applies them, and as Megatron's own step does."""
    install_platform()
    results = []
    for megatrons in (False, True):
        actor, batch = build_actor(policy_config(optimizer={"clip_grad": 0.5})), fixed_batch()
        if megatrons:
            step = actor.optimizer.step
            patches = [
                mock.patch("aer_megatron.actor.updates.gradient_norm", lambda optimizer: 1.0),
                mock.patch("aer_megatron.actor.updates.apply_gradients", lambda optimizer, norm, step=step: step()),
            ]
        else:
            patches = []
        for patch in patches:
            patch.start()
        for _ in range(3):
            actor.train(batch, seed=0, entropy_gradient=True)
        for patch in patches:
            patch.stop()
        results.append([tensor.detach().clone().numpy() for _, tensor in actor.hf_weights()])
    return results


def test_weights_are_those_of_megatrons_own_step_bit_for_bit() -> None:
    for ours, megatrons in run_distributed(_good_weights, 2, timeout_s=300):
        for mine, theirs in zip(ours, megatrons, strict=True):
            np.testing.assert_array_equal(mine, theirs)

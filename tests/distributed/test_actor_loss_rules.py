"""Every rule of the loss gives the same numbers for every layout and micro-batch size, fp32; the reference policy.

The batch is well separated: no two covariances, and no covariance and threshold, lie within a layout's rounding.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import pytest

from aer_megatron.actor import actor as actor_module
from aer_megatron.actor.batching import minibatch_indices
from aer_megatron.parallel.platform import install_platform
from tests.support.experiences import with_context
from tests.support.policies import build_actor, build_topology, fixed_batch, policy_config, tiny_hf_model
from tests.support.spawn import run_distributed


class Layout(NamedTuple):
    tp: int = 1
    pp: int = 1
    cp: int = 1
    micro_batch_size: int = 3


ONE_RANK = [Layout(micro_batch_size=3), Layout(micro_batch_size=1)]
WHOLE = ONE_RANK[0]
TWO_RANKS = [Layout(micro_batch_size=1), Layout(micro_batch_size=3), Layout(tp=2), Layout(pp=2), Layout(cp=2)]
CLIP_COV = {"kind": "clip_cov", "fraction": 0.1, "covariance_low": -0.2, "covariance_high": 3.0}
KL_COV = {"kind": "kl_cov", "fraction": 0.1}
RULES: dict[str, dict[str, Any]] = {
    "clip_higher": {"policy_loss": {"clip_high": 0.28}},
    "dual_clip": {"policy_loss": {"dual_clip": 1.1}},
    "clip_cov": {"policy_loss": CLIP_COV},
    "kl_cov": {"policy_loss": KL_COV},
    "gspo": {"policy_loss": {"kind": "gspo"}, "normalizer": "sequences"},
    "gspo, masked": {"policy_loss": {"kind": "gspo"}, "normalizer": "sequences"},
    "cispo": {"policy_loss": {"kind": "cispo", "clip_high": 0.001}},
    "reinforce": {"policy_loss": {"kind": "reinforce"}},
    "soft_clip": {"policy_loss": {"kind": "examples.extend.soft_clip:SoftClip", "tau_negative": 3.0}},
    "sequences": {"normalizer": "sequences"},
    "constant": {"normalizer": "constant"},
    "reference_kl": {"kl_coefficient": 0.2},
    "reference_k1": {"kl_coefficient": 0.2, "kl_estimator": {"kind": "k1"}},
    "tis": {"correction": {"weight": "token", "high": 1.1}},
    "mis of sequences": {"correction": {"weight": "sequence", "bound": "mask", "low": 0.5, "high": 1.3}},
    "reject, kept": {
        "normalizer": "sequences",
        "correction": {
            "weight": "token",
            "reject": "geometric",
            "reject_low": 0.95,
            "reject_high": 1.05,
            "denominator": "kept",
        },
    },
    "clip_cov, masked": {"policy_loss": CLIP_COV},  # a tool said some of the response tokens
    "kl_cov, masked": {"policy_loss": KL_COV},
    "everything": {
        "policy_loss": {**CLIP_COV, "dual_clip": 1.1},
        "normalizer": "sequences",
        "kl_coefficient": 0.2,
        "correction": {"weight": "token", "high": 1.1},
    },
}
NUM_MINIBATCHES = 2
MUTATED = (*ONE_RANK, TWO_RANKS[1])


def _rules_of(layout: Layout) -> list[str]:
    if layout.cp > 1:
        return ["gspo", "gspo, masked", "reference_k1"]
    return ["reference_kl", "gspo", "everything"] if layout.pp > 1 else list(RULES)


def _config(layout: Layout, options: dict[str, Any]) -> Any:
    return policy_config(
        parallel=layout._asdict(),
        algo={"num_minibatches": NUM_MINIBATCHES, **options},
        rollout={"max_new_tokens": 10},
    )


def _reference_weights(name: str) -> Any:
    return tiny_hf_model(seed=1).state_dict()[name]


def _fixed_batch(rule: str) -> Any:
    return with_context(fixed_batch()) if rule.endswith("masked") else fixed_batch()


def _batch(actor: Any, rule: str) -> Any:
    """The fixed batch as the trainer would hold it, with a rollout engine that is a little off."""
    batch = _fixed_batch(rule)
    old = actor.score(batch.experience).logprob_T
    noise = np.random.default_rng(5).normal(size=len(old)) * 0.2
    reference = None
    if RULES[rule].get("kl_coefficient"):
        actor.hold_reference(_reference_weights)
        reference = actor.score_reference(batch.experience)
    return dataclasses.replace(
        batch,
        experience=dataclasses.replace(batch.experience, rollout_logprob_T=(old + noise).astype(np.float32)),
        old_logprob_T=old,
        ref_logprob_T=reference,
    )


def _train(layout: Layout, topology: Any, rule: str, *, per_micro_batch: bool = False) -> dict[str, Any]:
    actor = build_actor(_config(layout, RULES[rule]), topology=topology)
    batch = _batch(actor, rule)
    selections = _record_selections(actor, per_micro_batch)
    stats = actor.train(batch, seed=3, entropy_gradient=True)
    after = actor.score(batch.experience)
    return {
        "sums": dict(stats.sums),
        "grad_norm": stats.grad_norm,
        "logprob": after.logprob_T,
        "entropy": after.token_entropy_T,
        "selections": selections,
    }


def _record_selections(actor: Any, per_micro_batch: bool) -> list[Any]:
    """Returns a list that fills with each mini-batch's selection; the mutant takes each micro-batch's statistics."""
    selections: list[Any] = []
    correct = actor._select_tokens

    def mutant(batch: Any, indices_b: Any, *, seed: int, moved: bool) -> Any:
        scores = actor._score(batch.experience, indices_b)
        selected_T = np.zeros(batch.experience.num_sampled_tokens, dtype=np.bool_)
        for micro in actor._micro_batches(batch.experience, indices_b):
            selected_T[micro.packed_t] = actor._config.algo.policy_loss.select(
                batch.advantage_B[micro.sequence_t],
                scores[0][micro.packed_t],
                batch.old_logprob_T[micro.packed_t],
                key=(seed, actor.num_updates),
            )
        return selected_T

    def record(*args: Any, **kwargs: Any) -> Any:
        selections.append((mutant if per_micro_batch else correct)(*args, **kwargs))
        return selections[-1]

    actor._select_tokens = record
    return selections


def _all_rules(rank: int, world_size: int, layouts: list[Layout]) -> dict[Any, Any]:
    install_platform()
    results: dict[Any, Any] = {}
    for layout in layouts:
        topology = build_topology(_config(layout, {}))
        for name in _rules_of(layout):
            results[layout, name] = _train(layout, topology, name)
        for name in ("clip_cov", "kl_cov") if layout in MUTATED else ():
            results[layout, f"{name} per micro-batch"] = _train(layout, topology, name, per_micro_batch=True)
        if layout.cp > 1:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(actor_module, "all_sum_within", lambda tensor, group: tensor)
                results[layout, "a rank's part of a sequence"] = _train(layout, topology, "gspo")
    if world_size == 1:
        results["reference"] = _reference_round_trip(topology)
    return results


def _reference_round_trip(topology: Any) -> dict[str, Any]:
    config = _config(Layout(), {"kl_coefficient": 0.1})
    actor = build_actor(config, topology=topology)
    experience = fixed_batch().experience
    initial = actor.score(experience).logprob_T
    actor.hold_reference(tiny_hf_model().state_dict().__getitem__)
    actor.train(dataclasses.replace(fixed_batch(), ref_logprob_T=initial), seed=0, entropy_gradient=True)
    before = {name: tensor.clone() for name, tensor in actor.hf_weights()}
    moved = actor.score(experience).logprob_T
    reference = actor.score_reference(experience)
    after = dict(actor.hf_weights())
    # a resumed run: the policy's own weights are others, the reference is again the initial one
    resumed = build_actor(config, topology=topology)
    resumed.load_hf_weights(before.__getitem__)
    resumed.hold_reference(tiny_hf_model().state_dict().__getitem__)
    return {
        "initial": initial,
        "moved": moved,
        "reference": reference,
        "unchanged": all(bool((before[name] == after[name]).all()) for name in before),
        "resumed": resumed.score(experience).logprob_T,
        "resumed_reference": resumed.score_reference(experience),
    }


@pytest.fixture(scope="module")
def one_rank() -> dict[Any, Any]:
    return run_distributed(_all_rules, 1, ONE_RANK, timeout_s=500)[0]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[Any, Any]]:
    return run_distributed(_all_rules, 2, TWO_RANKS, timeout_s=500)


def _check_same(result: dict[str, Any], expected: dict[str, Any]) -> None:
    for mine, theirs in zip(result["selections"], expected["selections"], strict=True):
        np.testing.assert_array_equal(mine, theirs, err_msg="selected tokens")
    np.testing.assert_allclose(result["grad_norm"], expected["grad_norm"], rtol=1e-5)
    assert result["sums"].keys() == expected["sums"].keys()
    for name, value in expected["sums"].items():
        # terms of both signs cancel: what counts is the rounding of a term
        np.testing.assert_allclose(result["sums"][name], value, rtol=1e-5, atol=1e-6 * value[1], err_msg=name)
    np.testing.assert_allclose(result["logprob"], expected["logprob"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(result["entropy"], expected["entropy"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_micro_batch_size_changes_no_number(rule: str, one_rank: dict[Any, Any]) -> None:
    _check_same(one_rank[ONE_RANK[1], rule], one_rank[WHOLE, rule])


@pytest.mark.parametrize(("layout", "rule"), [(layout, rule) for layout in TWO_RANKS for rule in _rules_of(layout)])
def test_layout_changes_no_number(
    layout: Layout, rule: str, one_rank: dict[Any, Any], two_ranks: list[dict[Any, Any]]
) -> None:
    for of_rank in two_ranks:
        _check_same(of_rank[layout, rule], one_rank[WHOLE, rule])
    first, second = (of_rank[layout, rule] for of_rank in two_ranks)
    assert first["sums"] == second["sums"] and first["grad_norm"] == second["grad_norm"]


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_changes_the_update(rule: str, one_rank: dict[Any, Any]) -> None:
    others = [one_rank[WHOLE, name]["grad_norm"] for name in RULES if name != rule]
    assert all(abs(one_rank[WHOLE, rule]["grad_norm"] - other) > 1e-5 for other in others)


@pytest.mark.parametrize("rule", ["clip_cov", "kl_cov", "clip_cov, masked", "kl_cov, masked"])
def test_the_selection_is_that_of_the_rule_on_the_whole_mini_batch(rule: str, one_rank: dict[Any, Any]) -> None:
    result = one_rank[WHOLE, rule]
    experience = _fixed_batch(rule).experience
    parts = minibatch_indices(experience.num_sequences, NUM_MINIBATCHES, 3)
    share = RULES[rule]["policy_loss"]["fraction"]
    total = 0
    for selected_T, part in zip(result["selections"], parts, strict=True):
        member_T = np.repeat(np.isin(np.arange(experience.num_sequences), part), experience.sampled_length_B)
        assert not selected_T[~member_T].any()
        assert selected_T.sum() == int(share * member_T.sum())
        total += int(selected_T.sum())
    assert result["sums"]["selected"] == (total, experience.num_sampled_tokens)


def test_the_ratio_of_a_part_of_a_sequence_is_caught(one_rank: dict[Any, Any], two_ranks: list[dict[Any, Any]]) -> None:
    wrong = two_ranks[0][Layout(cp=2), "a rank's part of a sequence"]
    with pytest.raises(AssertionError):
        _check_same(wrong, one_rank[WHOLE, "gspo"])


@pytest.mark.parametrize("rule", ["clip_cov", "kl_cov"])
def test_statistics_of_a_micro_batch_are_caught(
    rule: str, one_rank: dict[Any, Any], two_ranks: list[dict[Any, Any]]
) -> None:
    mutant = f"{rule} per micro-batch"
    with pytest.raises(AssertionError, match="selected tokens"):
        _check_same(one_rank[ONE_RANK[1], mutant], one_rank[WHOLE, mutant])  # micro-batch sizes 1 and 3
    with pytest.raises(AssertionError, match="selected tokens"):
        _check_same(two_ranks[0][TWO_RANKS[1], mutant], one_rank[WHOLE, mutant])  # two replicas and one


def test_the_reference_is_scored_in_place_and_leaves_no_trace(one_rank: dict[Any, Any]) -> None:
    result = one_rank["reference"]
    np.testing.assert_array_equal(result["reference"], result["initial"])
    assert np.abs(result["moved"] - result["initial"]).max() > 1e-2
    assert result["unchanged"]


def test_a_resumed_run_has_the_initial_policy_as_its_reference(one_rank: dict[Any, Any]) -> None:
    result = one_rank["reference"]
    np.testing.assert_array_equal(result["resumed_reference"], result["initial"])
    np.testing.assert_array_equal(result["resumed"], result["moved"])

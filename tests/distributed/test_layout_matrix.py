"""Every parallel layout, padded and packed, gives the numbers of one rank; planted mistakes do not.

{TP, SP, PP, VPP, CP, EP, DP and their products} x {padded, packed} x {1, 3 micro-batches} on 2 and 4 gloo ranks: loss,
entropy and their kin, log-probabilities, the gradient of every tensor, the weights after one optimizer step.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from aer_megatron.types import Experience
from tests.support.layout_matrix import (
    VARIANTS,
    Layout,
    Variant,
    differences,
    gradient_distance,
    run_layouts,
    update,
    whole,
)
from tests.support.layout_mutants import MUTANTS
from tests.support.policies import build_actor, build_topology, fixed_batch, policy_config, tiny_hf_model
from tests.support.spawn import run_distributed

EXPERTS = Layout(experts=True, tied=False)
BF16 = Layout(dtype="bf16")
WHOLE = [Layout(), Layout(tied=False), EXPERTS, BF16]
TWO = {
    "tp": Layout(tp=2),
    "sp": Layout(tp=2, sequence_parallel=True),
    "pp": Layout(pp=2),
    "vpp": Layout(pp=2, vpp=2),
    "cp": Layout(cp=2),
    "ep": replace(EXPERTS, ep=2),
    "dp": Layout(),
}
FOUR = {
    "tp x pp": Layout(tp=2, pp=2, tied=False),
    "tp x dp": Layout(tp=2),
    "cp x dp": Layout(cp=2),
    "pp x vpp x dp": Layout(pp=2, vpp=2),
    "cp 4": Layout(cp=4),
    "pp 4": Layout(pp=4),
    "tp x cp, sp": Layout(tp=2, cp=2, sequence_parallel=True),
    "tp x pp x vpp, sp": Layout(tp=2, pp=2, vpp=2, sequence_parallel=True),
    "tp x ep, sp": replace(EXPERTS, tp=2, ep=2, sequence_parallel=True),
    "cp x ep x dp": replace(EXPERTS, cp=2, ep=2),
}
HALF_PRECISION = {
    "sp": replace(BF16, tp=2, sequence_parallel=True),
    "vpp": replace(BF16, pp=2, vpp=2),
    "cp": replace(BF16, cp=2),
}
PACKED_THREE = Variant(packed=True, micro_batches=3)
# a tool speaks inside of the responses: padded where the layout's packed rows are the matrix's own, and packed
MASKED = Variant(masked=True)
MASKED_PACKED = Variant(packed=True, micro_batches=3, masked=True)
MASKED_LAYOUTS = {"sp": TWO["sp"], "vpp": TWO["vpp"], "cp": TWO["cp"], "dp": TWO["dp"]}


def _changed_sequence(rank: int, world_size: int) -> list[tuple[Any, Any]]:
    """Returns log-probabilities and entropies before and after another sequence's tokens change, all in one row."""
    layout = Layout(cp=world_size)
    topology = build_topology(policy_config(parallel=layout.parallel()))
    config = policy_config(
        parallel={**layout.parallel(), **Variant(packed=True).parallel(topology.dp)},
        data={"max_prompt_tokens": 8},
        rollout={"max_new_tokens": 8},
    )
    actor = build_actor(config, topology=topology, model=tiny_hf_model(num_layers=4))
    before = fixed_batch().experience
    results = []
    for experience in (before, _with_other_tokens(before, 5)):
        scores = actor.score(experience)
        results.append((scores.logprob_T, scores.token_entropy_T))
    return results


def _with_other_tokens(experience: Experience, changed: int) -> Experience:
    length_B = experience.prompt_length_B + experience.response_length_B
    tokens_L = experience.token_ids_L.copy()
    start = int(length_B[:changed].sum())
    tokens_L[start : start + int(length_B[changed])] += 1
    return replace(experience, token_ids_L=tokens_L % 25)


def _one_rank(rank: int, world_size: int) -> dict[str, Any]:
    results = run_layouts(rank, world_size, WHOLE, [Variant()])
    cuts = [*VARIANTS[1:], MASKED, MASKED_PACKED]
    variants = run_layouts(rank, world_size, [Layout()], cuts)[0]
    return {
        "whole": dict(zip(WHOLE, [of_layout[0] for of_layout in results], strict=True)),
        "variants": dict(zip(cuts, variants, strict=True)),
        "isolation": _changed_sequence(rank, world_size),
    }


def _two_ranks(rank: int, world_size: int) -> dict[str, Any]:
    matrix = run_layouts(rank, world_size, list(TWO.values()), VARIANTS)
    half = run_layouts(rank, world_size, list(HALF_PRECISION.values()), [PACKED_THREE])
    masked = run_layouts(rank, world_size, list(MASKED_LAYOUTS.values()), [MASKED, MASKED_PACKED])
    isolation = _changed_sequence(rank, world_size)
    mutants = {}
    for name, (mutation, layout, variant) in MUTANTS.items():
        topology = build_topology(policy_config(parallel=layout.parallel()))
        mutants[name] = update(layout, variant, topology, mutation)
    if rank:
        return {}
    return {
        "matrix": dict(zip(TWO, matrix, strict=True)),
        "half": dict(zip(HALF_PRECISION, [of_layout[0] for of_layout in half], strict=True)),
        "masked": dict(zip(MASKED_LAYOUTS, masked, strict=True)),
        "isolation": isolation,
        "mutants": mutants,
    }


def _four_ranks(rank: int, world_size: int) -> dict[str, Any]:
    return dict(zip(FOUR, run_layouts(rank, world_size, list(FOUR.values()), VARIANTS) or [None] * 10, strict=True))


@pytest.fixture(scope="module")
def one_rank() -> dict[str, Any]:
    return run_distributed(_one_rank, 1, timeout_s=600)[0]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def two_ranks() -> dict[str, Any]:
    return run_distributed(_two_ranks, 2, timeout_s=900)[0]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def four_ranks() -> dict[str, Any]:
    return run_distributed(_four_ranks, 4, timeout_s=900)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("variant", VARIANTS[1:], ids=str)
def test_one_rank_cut_in_another_way(variant: Variant, one_rank: dict[str, Any]) -> None:
    found = one_rank["variants"][variant]
    assert found["micro_batches"] == variant.micro_batches
    assert differences(found, one_rank["whole"][Layout()], rtol=1e-5) == []


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("name", TWO)
def test_two_ranks(name: str, variant: Variant, one_rank: dict[str, Any], two_ranks: dict[str, Any]) -> None:
    layout, found = TWO[name], two_ranks["matrix"][name][VARIANTS.index(variant)]
    assert found["micro_batches"] == (variant.micro_batches + 1 if layout.vpp > 1 else variant.micro_batches)
    assert differences(found, one_rank["whole"][whole(layout)], rtol=1e-5) == []


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("name", FOUR)
def test_four_ranks(name: str, variant: Variant, one_rank: dict[str, Any], four_ranks: dict[str, Any]) -> None:
    found = four_ranks[name][VARIANTS.index(variant)]
    assert differences(found, one_rank["whole"][whole(FOUR[name])], rtol=1e-5) == []


def test_one_rank_with_a_tool_s_words_in_the_responses(one_rank: dict[str, Any]) -> None:
    padded, packed = (one_rank["variants"][variant] for variant in (MASKED, MASKED_PACKED))
    assert packed["micro_batches"] == 3
    assert differences(packed, padded, rtol=1e-5) == []
    assert padded["sums"]["token_entropy"][1] < one_rank["whole"][Layout()]["sums"]["token_entropy"][1]


@pytest.mark.parametrize("variant", [MASKED, MASKED_PACKED], ids=str)
@pytest.mark.parametrize("name", MASKED_LAYOUTS)
def test_two_ranks_with_a_tool_s_words_in_the_responses(
    name: str, variant: Variant, one_rank: dict[str, Any], two_ranks: dict[str, Any]
) -> None:
    found = two_ranks["masked"][name][(MASKED, MASKED_PACKED).index(variant)]
    assert differences(found, one_rank["variants"][MASKED], rtol=1e-5) == []


@pytest.mark.parametrize("name", HALF_PRECISION)
def test_bf16_within_its_rounding(name: str, one_rank: dict[str, Any], two_ranks: dict[str, Any]) -> None:
    found, expected = two_ranks["half"][name], one_rank["whole"][BF16]
    exact = one_rank["whole"][Layout()]
    assert differences(found, expected, rtol=0.1) == []
    rounding = gradient_distance(expected, exact)
    assert 1e-3 < rounding < 5e-2
    assert gradient_distance(found, exact) < 1.5 * rounding


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_mistake_is_seen(name: str, one_rank: dict[str, Any], two_ranks: dict[str, Any]) -> None:
    _, layout, variant = MUTANTS[name]
    expected = one_rank["variants"][MASKED] if variant.masked else one_rank["whole"][whole(layout)]
    assert differences(two_ranks["mutants"][name], expected, rtol=1e-5) != []


@pytest.mark.parametrize("ranks", ["one_rank", "two_ranks"])
def test_a_packed_sequence_changes_no_bit_of_another(ranks: str, request: pytest.FixtureRequest) -> None:
    before, after = request.getfixturevalue(ranks)["isolation"]
    experience = fixed_batch().experience
    of_changed = np.repeat(np.arange(12) == 5, experience.response_length_B)
    for first, second in zip(before, after, strict=True):
        assert np.array_equal(first[~of_changed], second[~of_changed])
        assert not np.array_equal(first[of_changed], second[of_changed])

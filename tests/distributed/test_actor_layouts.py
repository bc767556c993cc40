"""The same numbers from every layout: loss, entropy, gradient norm and weights after updates, fp32."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from aer_megatron.parallel.platform import install_platform
from tests.support.policies import build_actor, fixed_batch, policy_config, tiny_hf_model
from tests.support.spawn import run_distributed


class Layout(NamedTuple):
    tp: int = 1
    pp: int = 1
    sequence_parallel: bool = False
    micro_batch_size: int = 12
    tied: bool = True
    head: str = "fused"
    recompute: str = ""  # activation recompute: "selective" or "full"


WHOLE = [Layout(tied=tied, head=head) for tied in (True, False) for head in ("fused", "logits")]
SHAPES = [
    Layout(tp=2),
    Layout(micro_batch_size=2),  # two ranks of data parallelism
    Layout(tp=2, sequence_parallel=True, micro_batch_size=4),
    Layout(pp=2, micro_batch_size=3),
]
SHARDED = [s._replace(tied=tied, head=head) for s in SHAPES for tied in (True, False) for head in ("fused", "logits")]
SHARDED += [Layout(tp=2, recompute="full"), Layout(micro_batch_size=2, recompute="selective")]
RECOMPUTE: dict[str, dict[str, Any]] = {
    "": {},
    "selective": {"recompute_granularity": "selective"},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def _updates(layout: Layout) -> dict[str, Any]:
    parallel = {"tp": layout.tp, "pp": layout.pp, "sequence_parallel": layout.sequence_parallel}
    config = policy_config(
        model={"head": layout.head},
        parallel={**parallel, "micro_batch_size": layout.micro_batch_size},
        megatron=RECOMPUTE[layout.recompute],
    )
    actor = build_actor(config, tied=layout.tied)
    batch = fixed_batch()
    scores = actor.score(batch.experience)
    steps = [actor.train(batch, seed=0, entropy_gradient=True) for _ in range(2)]
    return {
        "logprob": scores.logprob_T,
        "entropy": scores.token_entropy_T,
        "sums": [dict(stats.sums) for stats in steps],
        "grad_norm": [stats.grad_norm for stats in steps],
        "weights": {name: tensor.numpy().copy() for name, tensor in actor.hf_weights()},
    }


def _all_updates(rank: int, world_size: int, layouts: list[Layout]) -> list[dict[str, Any]]:
    install_platform()
    return [_updates(layout) for layout in layouts]


def _whole(rank: int, world_size: int) -> dict[str, Any]:
    install_platform()
    results: dict[str, Any] = {"whole": [_updates(layout) for layout in WHOLE]}
    bf16 = build_actor(policy_config(model={"dtype": "bf16"})).train(fixed_batch(), seed=0, entropy_gradient=True)
    results["bf16"] = (bf16.mean("token_entropy"), bf16.grad_norm)
    without = build_actor(policy_config()).train(fixed_batch(), seed=0, entropy_gradient=False)
    results["without_entropy_gradient"] = without.grad_norm
    return results


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    return run_distributed(_whole, 1, timeout_s=300)[0]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def sharded() -> list[list[dict[str, Any]]]:
    return run_distributed(_all_updates, 2, SHARDED, timeout_s=600)


@pytest.mark.parametrize("index", range(len(SHARDED)), ids=[str(tuple(layout)) for layout in SHARDED])
def test_layout_gives_the_numbers_of_one_rank(
    index: int, whole: dict[str, Any], sharded: list[list[dict[str, Any]]]
) -> None:
    layout = SHARDED[index]
    expected = whole["whole"][WHOLE.index(Layout(tied=layout.tied, head=layout.head))]
    for of_rank in sharded:
        result = of_rank[index]
        np.testing.assert_allclose(result["logprob"], expected["logprob"], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(result["entropy"], expected["entropy"], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(result["grad_norm"], expected["grad_norm"], rtol=1e-5)
        for mine, theirs in zip(result["sums"], expected["sums"], strict=True):
            assert mine.keys() == theirs.keys()
            for name in theirs:
                np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-5, atol=1e-5, err_msg=name)
        for name, tensor in expected["weights"].items():
            np.testing.assert_allclose(result["weights"][name], tensor, rtol=1e-4, atol=2e-5, err_msg=name)


def test_ranks_agree_bitwise(sharded: list[list[dict[str, Any]]]) -> None:
    for first, second in zip(*sharded, strict=True):
        assert first["sums"] == second["sums"]
        assert first["grad_norm"] == second["grad_norm"]
        np.testing.assert_array_equal(first["entropy"], second["entropy"])
        for name, tensor in first["weights"].items():
            np.testing.assert_array_equal(tensor, second["weights"][name], err_msg=name)


def test_fused_and_whole_logits_agree(whole: dict[str, Any]) -> None:
    for tied in (True, False):
        fused = whole["whole"][WHOLE.index(Layout(tied=tied, head="fused"))]
        logits = whole["whole"][WHOLE.index(Layout(tied=tied, head="logits"))]
        np.testing.assert_allclose(fused["grad_norm"], logits["grad_norm"], rtol=1e-5)
        np.testing.assert_allclose(fused["entropy"], logits["entropy"], atol=1e-5)


def test_scores_equal_transformers_in_fp64(whole: dict[str, Any]) -> None:
    result = whole["whole"][0]
    model = tiny_hf_model().double()
    experience = fixed_batch().experience
    start, expected_logprob, expected_entropy = 0, [], []
    for prompt, response in zip(experience.prompt_length_B, experience.response_length_B, strict=True):
        ids = torch.from_numpy(experience.token_ids_L[start : start + prompt + response])
        start += prompt + response
        with torch.no_grad():
            logp = model(ids[None]).logits[0].log_softmax(-1)
        rows = torch.arange(prompt - 1, prompt + response - 1)
        expected_logprob.append(logp[rows, ids[rows + 1]])
        expected_entropy.append(-(logp[rows].exp() * logp[rows]).sum(-1))
    np.testing.assert_allclose(result["logprob"], torch.cat(expected_logprob), atol=2e-5)
    np.testing.assert_allclose(result["entropy"], torch.cat(expected_entropy), atol=2e-5)


def test_bf16_follows_fp32_within_its_rounding(whole: dict[str, Any]) -> None:
    total, count = whole["whole"][0]["sums"][0]["token_entropy"]
    mean_entropy, grad_norm = whole["bf16"]
    assert mean_entropy == pytest.approx(total / count, rel=2e-2)
    assert grad_norm == pytest.approx(whole["whole"][0]["grad_norm"][0], rel=5e-2)


def test_the_entropy_gradient_is_an_explicit_choice(whole: dict[str, Any]) -> None:
    assert abs(whole["whole"][0]["grad_norm"][0] - whole["without_entropy_gradient"]) > 1e-3

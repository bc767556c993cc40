"""Losses, gradients and advantages against an independent reference, shared/cases/losses: its README has the forms."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from aer_megatron.algo.advantage import overlong_penalty
from aer_megatron.algo.correction import correction
from aer_megatron.algo.difficulty import difficulty
from aer_megatron.algo.loss import TokenData, policy_loss, sequence_log_ratios, sequence_weights
from aer_megatron.algo.options import AlgoSection

CASES = Path(__file__).parents[3] / "shared" / "cases" / "losses" / "cases_seen.json"
pytestmark = pytest.mark.skipif(not CASES.is_file(), reason="no ../shared/cases beside the project")

ADVANTAGES = {
    "grpo": "grpo",
    "grpo_batch_std": "grpo",
    "dr_grpo": "dr_grpo",
    "rloo": "rloo",
    "maxk": "max_at_k",
    "passk_training": "pass_at_k",
}
BASELINES = {"plain": "none", "loo": "loo", "loo_minus_one": "loo_minus_one"}
NORMALIZERS = {"token_mean": "tokens", "seq_mean": "sequences", "constant": "constant"}
# forms that the package does not have: rewards without a verdict, shaping of advantages, the product of ratios, DAPO's
# mean within a prompt's group, KL in the reward, other penalties of KL-Cov
FORMS_WITHOUT = ("shaping", "kl_in_reward")


@cache
def cases() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(CASES.read_text(encoding="utf-8"))
    return loaded


def options_of(name: str) -> dict[str, Any]:
    return {**cases()["defaults"], **cases()["option_sets"][name]}


def is_ours(options: dict[str, Any]) -> bool:
    return (
        not any(options[form] for form in FORMS_WITHOUT)
        and options["policy"] not in ("sequence_clip", "mai", "clip_cov")
        and options["aggregate"] in NORMALIZERS
        and options["cov_kl"] == "abs"
        and options["none_verdict"] == "keep"
    )


def section_of(options: dict[str, Any]) -> AlgoSection:
    """Returns the options of a case as ``[algo]`` writes them."""
    policy = options["policy"].removesuffix("_token").replace("none", "reinforce")  # of advantages of 0
    loss: dict[str, Any] = {"kind": policy}
    if policy in ("clip", "gspo"):
        loss |= {"clip_low": options["eps_low"], "clip_high": options["eps_high"]}
        loss |= {"dual_clip": options["dual_clip"] or 0.0}
    elif policy == "cispo":
        loss |= {"clip_low": options["eps_low"] or 1.0, "clip_high": options["eps_high"]}
    elif policy == "kl_cov":
        loss |= {"fraction": options["cov_share"], "coefficient": options["cov_beta"]}
    advantage: dict[str, Any] = {"kind": ADVANTAGES[options["advantage"]]}
    if advantage["kind"] == "grpo":
        deviation = "population" if options["ddof"] == 0 else "sample"
        advantage |= {"std_epsilon": options["std_eps"]}
        advantage |= {"deviation": "batch" if options["advantage"] == "grpo_batch_std" else deviation}
    elif advantage["kind"] == "max_at_k":
        advantage |= {"k": options["k"], "baseline": BASELINES[options["maxk_form"]]}
    elif advantage["kind"] == "pass_at_k":
        advantage |= {"k": options["k"]}
    table: dict[str, Any] = {"policy_loss": loss, "advantage": advantage}
    table["normalizer"] = NORMALIZERS[options["aggregate"]]
    if options["kl"]:
        table["kl_coefficient"] = options["kl"]["coef"]
        table["kl_estimator"] = {"kind": options["kl"]["estimator"], "ratio": options["kl"]["ratio"]}
    if options["overlong"]:
        table["overlong_buffer"] = options["overlong"]["cache"]
        table["overlong_penalty"] = options["overlong"]["factor"]
    table["correction"] = correction_of(options["correction"])
    return AlgoSection.from_table(table)


def correction_of(given: Any) -> dict[str, Any]:
    """Returns a case's correction, or list of them, as ``[algo.correction]`` writes it."""
    table: dict[str, Any] = {"weight": "none"}
    for each in [given] if isinstance(given, dict) else given or []:
        low, high = each["low"] or 0.0, each["high"] or 0.0
        if each["kind"] == "reject":
            table |= {"reject": each["level"], "reject_low": low, "reject_high": high}
        else:
            table |= {"weight": each["level"], "bound": each["kind"], "low": low, "high": high}
        table |= {"veto": each["veto"]} if each["veto"] else {}
        table |= {"denominator": "kept"} if each["denominator"] == "kept" else {}
    return table


class Batch:
    """The trained tokens of a batch. Ours: there is one at least, and every reward is a number."""

    def __init__(self, name: str) -> None:
        raw = cases()["batches"][name]
        self.name = name
        self.keep_T = np.array(raw["mask"], dtype=bool)
        sequence_T = np.repeat(np.arange(len(raw["lengths"])), raw["lengths"])
        self.sequence_T = sequence_T[self.keep_T]
        self.response_length_B = np.array(raw["lengths"])
        self.length_B = np.bincount(self.sequence_T, minlength=len(raw["lengths"]))
        self.reward_B = np.array([np.nan if reward is None else reward for reward in raw["rewards"]], dtype=np.float64)
        self.group_B = np.unique(raw["groups"], return_inverse=True)[1].astype(np.int64)
        names = ("logprobs", "old_logprobs", "rollout_logprobs", "ref_logprobs", "entropy")
        self.columns = {name: torch.tensor(raw[name], dtype=torch.float64)[self.keep_T] for name in names}
        self.is_ours = bool(self.length_B.any() and np.isfinite(self.reward_B).all())


def our_forms() -> list[str]:
    return [name for name in cases()["option_sets"] if is_ours(options_of(name))] if CASES.is_file() else []


def loss_of(batch: Batch, options: dict[str, Any], advantage_B: Any) -> tuple[float, np.ndarray]:
    """Returns (the loss, its gradient in the log-probabilities [T])."""
    config, columns = section_of(options), batch.columns
    logprob_T = columns["logprobs"].clone().requires_grad_()
    old_T = columns["old_logprobs"]
    advantage_T = torch.from_numpy(advantage_B[batch.sequence_T])
    rule = config.policy_loss
    selected_T = None
    if rule.selects:
        picked = rule.select(advantage_T.numpy(), columns["logprobs"].numpy(), old_T.numpy(), key=(0, 0))
        selected_T = torch.from_numpy(picked)
    corrected = correction(old_T.numpy(), columns["rollout_logprobs"].numpy(), batch.length_B, config.correction)
    length_B = corrected.counted_length_B if corrected else batch.length_B
    # some of the reference's sequences never had a token; they count unless the denominator is what is kept
    counted_B = (length_B > 0) | (config.correction.denominator == "all")
    weight_B = np.zeros(len(length_B))
    weight_B[counted_B] = sequence_weights(
        length_B[counted_B], rule=config.normalizer, max_new_tokens=int(options["constant"])
    )
    mean_weight_T = torch.from_numpy(weight_B[batch.sequence_T] * (corrected.counted_T if corrected else 1.0))
    entropy = {"alpha": 0.0, "rho": None} | (options["entropy"] or {})
    coefficient_B = np.full(len(batch.length_B), entropy["alpha"])
    if entropy["rho"]:
        accuracy_P = np.bincount(batch.group_B, batch.reward_B) / np.bincount(batch.group_B)
        coefficient_B *= difficulty(accuracy_P, shape="linear_deficit", rho=entropy["rho"])[batch.group_B]
    tokens = TokenData(
        old_logprob_T=old_T,
        advantage_T=advantage_T,
        entropy_weight_T=torch.from_numpy(coefficient_B[batch.sequence_T]),
        mean_weight_T=mean_weight_T,
        importance_T=torch.from_numpy(corrected.weight_T) if corrected else None,
        selected_T=selected_T,
        ref_logprob_T=columns["ref_logprobs"],
        sequence_log_ratio_T=sequence_log_ratios(
            logprob_T,
            old_T,
            sequence_T=torch.from_numpy(batch.sequence_T),
            length_B=torch.from_numpy(batch.length_B),
        ),
    )
    result = policy_loss(
        logprob_T, columns["entropy"], tokens=tokens, normalizer=max(float(length_B.sum()), 1.0), config=config
    )
    result.loss.backward()
    assert logprob_T.grad is not None
    return float(result.loss.detach()), logprob_T.grad.numpy()


def test_most_forms_are_held_against_the_reference() -> None:
    assert len(our_forms()) >= 78, sorted(set(cases()["option_sets"]) - set(our_forms()))


@pytest.mark.parametrize("form", our_forms())
def test_loss_gradient_and_advantages_are_the_references(form: str) -> None:
    batches = [batch for batch in map(Batch, cases()["batches"]) if batch.is_ours]
    assert len(batches) >= 9
    if (options_of(form)["entropy"] or {}).get("rho"):  # difficulty is of verdicts, right or wrong
        batches = [batch for batch in batches if set(batch.reward_B) <= {0.0, 1.0}]
    for batch in batches:
        _compare(batch, options_of(form), cases()["expected"][batch.name][form])


def _compare(batch: Batch, options: dict[str, Any], expected: dict[str, Any]) -> None:
    config = section_of(options)
    limit = (options["overlong"] or {}).get("max_length", 0)
    lengths: Any = SimpleNamespace(response_length_B=batch.response_length_B)
    penalty_B = overlong_penalty(lengths, config, max_new_tokens=limit)
    reward_B = batch.reward_B if penalty_B is None else batch.reward_B - penalty_B
    advantage_B, _ = config.advantage.advantages(reward_B, batch.group_B)
    _assert_near(advantage_B, expected["advantages"], f"advantages of {batch.name}")
    loss, gradient_T = loss_of(
        batch, options, np.zeros_like(advantage_B) if options["policy"] == "none" else advantage_B
    )
    _assert_near(loss, expected["loss"], f"loss of {batch.name}")
    _assert_near(gradient_T, np.array(expected["grad_logprobs"])[batch.keep_T], f"gradient of {batch.name}")


def _assert_near(found: Any, expected: Any, what: str) -> None:
    scale = np.maximum(1.0, np.abs(expected))
    np.testing.assert_allclose(np.asarray(found) / scale, np.asarray(expected) / scale, atol=1e-6, rtol=0, err_msg=what)

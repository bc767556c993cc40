"""Train/rollout mismatch against numbers derived by hand, and the controller that holds alpha on it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from aer_megatron.algo import controller
from aer_megatron.algo.controller import ControllerState, Observation
from aer_megatron.algo.entropy_rules.aer import Aer
from aer_megatron.algo.entropy_rules.base import EntropyRule
from aer_megatron.algo.entropy_rules.fixed import Fixed
from aer_megatron.algo.entropy_rules.skywork import Skywork
from aer_megatron.algo.experience import pack_groups, staleness
from aer_megatron.algo.flight import FlightRecord, replay
from aer_megatron.algo.mismatch import measure_mismatch
from aer_megatron.types import Completion, Prompt, RolloutGroup, ScoredGroup, Verdict, VersionSpan
from tests.support.flights import flight_records

LN2 = math.log(2)
STATE = ControllerState(step=7, alpha=0.003, integral=0.001, initial_entropy=0.9, held_steps=1, frozen_steps=2)


def test_three_tokens() -> None:
    # rollout probabilities 1/2, 1/4, 1/8, trained ones 1, 1/4, 1/16: x = ln 2, 0, -ln 2 and w = 2, 1, 1/2
    rollout_T = np.log(np.array([1 / 2, 1 / 4, 1 / 8])).astype(np.float32)
    train_T = np.log(np.array([1, 1 / 4, 1 / 16])).astype(np.float32)
    mismatch = measure_mismatch(train_T, rollout_T)
    assert mismatch.largest == pytest.approx(LN2, rel=1e-6)
    assert mismatch.difference_mean == pytest.approx(2 * LN2 / 3, rel=1e-6)
    # k3: (2 - 1 - ln 2) + 0 + (1/2 - 1 + ln 2) = 1/2
    assert mismatch.kl == pytest.approx(1 / 6, rel=1e-6)
    # (2 + 1 + 1/2)^2 / (3 (4 + 1 + 1/4)) = 12.25 / 15.75
    assert mismatch.sample_size == pytest.approx(7 / 9, rel=1e-6)


def test_equal_policies_and_the_worst_case() -> None:
    same_T = np.full(5, -0.7, dtype=np.float32)
    equal = measure_mismatch(same_T, same_T)
    assert (equal.largest, equal.difference_mean, equal.kl, equal.sample_size) == (0.0, 0.0, 0.0, 1.0)
    # one token carries all of the weight: 1 / n
    lone_T = np.array([-20.0, -40.0, -40.0, -40.0], dtype=np.float32)
    assert measure_mismatch(lone_T, np.full(4, -20.0, dtype=np.float32)).sample_size == pytest.approx(1 / 4, rel=1e-6)
    # a log-ratio beyond what exp can hold stays finite
    far = measure_mismatch(np.zeros(2, dtype=np.float32), np.array([-1e4, 0.0], dtype=np.float32))
    assert math.isfinite(far.kl) and math.isfinite(far.sample_size) and far.largest == 1e4


def test_a_tiny_difference_is_not_lost_to_rounding() -> None:
    # k3 of x is x^2 / 2 + O(x^3): exp(1e-9) - 1 - 1e-9 computed naively is 8e-17 of noise
    mismatch = measure_mismatch(np.array([0.0], dtype=np.float32), np.array([-1e-6], dtype=np.float32))
    assert mismatch.kl == pytest.approx(float(np.float32(1e-6)) ** 2 / 2, rel=1e-5)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="one entry per sampled token"):
        measure_mismatch(np.zeros(2, dtype=np.float32), np.zeros(3, dtype=np.float32))


def seen(kl: float) -> Observation:
    return Observation(310.0, 1000.0, 0.5, mismatch_kl=kl)


@pytest.mark.parametrize("options", [Aer(update="pi", k_p=1.0), Skywork()])
@pytest.mark.parametrize("kl", [0.2, math.inf, math.nan])
def test_a_mismatch_above_its_bound_holds_alpha_and_says_so(options: EntropyRule, kl: float) -> None:
    decision = controller.step(STATE, options, seen(kl))
    assert decision.state == replace(STATE, step=8, held_steps=2)
    assert decision.held and not decision.frozen
    assert decision.reason.startswith("alpha 0.003 held: mismatch, KL ")
    assert decision.reason.endswith(" nats between rollout engine and trainer above 0.1")


def test_at_its_bound_or_without_one_alpha_moves() -> None:
    for options, kl in ((Aer(mismatch_bound=0.1), 0.1), (Aer(mismatch_bound=0), 1e9)):
        decision = controller.step(STATE, options, seen(kl))
        assert not decision.held and decision.state.alpha > STATE.alpha
        assert decision == controller.step(STATE, options, seen(0.0))
    constant = controller.step(STATE, Fixed(), seen(1e9))  # steers by nothing
    assert not constant.held


def test_the_target_is_not_anchored_in_a_mismatched_batch() -> None:
    options = Aer()
    start = controller.initial_state(options)
    assert controller.step(start, options, seen(1.0)).state == replace(start, step=1, held_steps=1)
    assert controller.step(start, options, seen(0.01)).state.initial_entropy == 0.31
    assert controller.step(start, Fixed(), seen(1.0)).state.initial_entropy is None  # nor by a rule that does not steer


def test_replay_reproduces_held_steps_and_another_bound_does_not() -> None:
    options = Aer(update="pi", eta=0.05, k_p=0.2, tau=1.2)
    state = controller.initial_state(options)
    records: list[FlightRecord] = []
    for record in flight_records(options, 12):  # the same observations, two of them mismatched
        observation = replace(record.observation, mismatch_kl=0.5 if record.step in (0, 6) else 1e-4)
        decision = controller.step(state, options, observation)
        state = decision.state
        records.append(replace(record, observation=observation, state=state))
    steps = replay(records, options, recorded=options)
    assert [step.decision.state for step in steps] == [record.state for record in records]
    assert [step.step for step in steps if step.decision.held] == [0, 6]
    blind = replay(records, options.model_copy(update={"mismatch_bound": 0.0}), recorded=options)
    assert not any(step.decision.held for step in blind)
    assert blind[0].decision.state.initial_entropy is not None and steps[0].decision.state.initial_entropy is None


def test_staleness_counts_every_token() -> None:
    # 4 tokens: 3 of version 5 and 1 of version 7; 2 tokens of version 8. Trained at 8: (3 * 3 + 1 + 0) / 6
    spans = [(VersionSpan(5, 0, 3), VersionSpan(7, 3, 4)), (VersionSpan(8, 0, 2),)]
    prompt = Prompt(1, "", (1,), "", "math")
    completions = tuple(Completion((1,) * row[-1].end, (0.0,) * row[-1].end, "stop", row) for row in spans)
    experience = pack_groups([ScoredGroup(RolloutGroup(prompt, completions), (Verdict(0.0, "wrong"),) * 2)])
    assert experience.policy_version_B.tolist() == [5, 8]
    result = staleness(experience, policy_version=8)
    assert (result.largest, result.mean) == (3, pytest.approx(10 / 6))

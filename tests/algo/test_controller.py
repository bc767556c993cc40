"""The controller against numbers derived by hand, in closed loop, and the laws that it keeps for any input."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ConfigDict

from aer_megatron.algo.controller import (
    ControllerState,
    Observation,
    initial_state,
    state_from_dict,
    state_to_dict,
    step,
)
from aer_megatron.algo.entropy_rules.aer import Aer
from aer_megatron.algo.entropy_rules.base import EntropyRule
from aer_megatron.algo.entropy_rules.fixed import Fixed
from aer_megatron.algo.entropy_rules.none import NoBonus
from aer_megatron.algo.entropy_rules.skywork import Skywork


class NoTarget(Aer):
    """A rule that cannot say where to steer."""

    def target_entropy(self, initial_entropy: float | None) -> float:
        return math.nan


class Wild(Aer):
    """A rule that returns what no rule may."""

    proposed: float = 0.0
    used: float = 0.0
    told: float = 0.0
    reports: ClassVar[tuple[str, ...]] = ("told",)

    model_config = ConfigDict(allow_inf_nan=True)

    def propose(
        self, alpha: float, integral: float, entropy: float, target: float, *, frozen: bool
    ) -> tuple[float, float]:
        return self.proposed, integral

    def loss_coefficient(self, alpha: float, token_entropy: float) -> float:
        return self.used

    def report(self, alpha: float, token_entropy: float) -> dict[str, tuple[float, float]]:
        return {"told" if self.told >= 0 else "untold": (self.told, 1.0)}


def state_with(alpha: float, *, initial_entropy: float | None = 0.9, integral: float = 0.0) -> ControllerState:
    return ControllerState(
        step=7, alpha=alpha, integral=integral, initial_entropy=initial_entropy, held_steps=0, frozen_steps=0
    )


def seen(entropy: float, *, difficulty_mean: float = 0.5, tokens: float = 1.0) -> Observation:
    return Observation(entropy_sum=entropy * tokens, token_count=tokens, difficulty_mean=difficulty_mean)


def test_alpha_starts_at_zero_and_fixed_at_its_constant():
    assert initial_state(Aer()).alpha == 0.0
    assert initial_state(Fixed(coefficient=0.02)).alpha == 0.02


def test_anchor_is_sum_over_count_and_is_set_once():
    # 720 nats over 800 tokens = 0.9 nats; tau = 0.4 gives a target of 0.36.
    config = Aer(tau=0.4)
    first = step(initial_state(config), config, Observation(720.0, 800.0, 0.5))
    assert first.state.initial_entropy == 0.9
    assert first.target == pytest.approx(0.36, rel=1e-15)
    second = step(first.state, config, Observation(100.0, 800.0, 0.5))
    assert second.state.initial_entropy == 0.9
    assert second.target == first.target


@pytest.mark.parametrize(
    "bad", [Observation(math.nan, 8, 0.5), Observation(math.inf, 8, 0.5), Observation(3.0, 0, 0.5)]
)
def test_anchor_leaves_the_state_on_an_unusable_statistic(bad):
    decision = step(initial_state(Aer()), Aer(), bad)
    assert decision.held
    assert decision.state.initial_entropy is None
    assert math.isnan(decision.target)
    # the next batch may anchor
    assert step(decision.state, Aer(), seen(0.5)).state.initial_entropy == 0.5


def test_proportional():
    # H* = 0.4 * 0.9 = 0.36; gap = 0.36 - 0.31 = 0.05; alpha = 0.0031 + 0.006 * 0.05 = 0.0034.
    decision = step(state_with(0.0031), Aer(eta=0.006), seen(0.31))
    assert decision.state.alpha == pytest.approx(0.0034, rel=1e-12)
    assert decision.state.step == 8
    assert decision.reason == "alpha 0.0031 -> 0.0034: H 0.31 below target 0.36"
    assert (decision.alarm, decision.held, decision.frozen) == (None, False, False)
    # gap = -0.3: 0.001 - 0.006 * 0.3 = -0.0008, clipped to 0.
    assert step(state_with(0.001), Aer(eta=0.006), seen(0.66)).state.alpha == 0.0
    # 0.0499 + 0.006 * 0.05 = 0.0502, clipped to 0.05.
    top = step(state_with(0.0499), Aer(eta=0.006), seen(0.31))
    assert top.state.alpha == 0.05
    assert top.reason.endswith("; at the upper bound 0.05")


def test_sign():
    config = Aer(update="sign", eta=0.001)
    assert step(state_with(0.0030), config, seen(0.35)).state.alpha == pytest.approx(0.0040, rel=1e-12)
    assert step(state_with(0.0030), config, seen(0.80)).state.alpha == pytest.approx(0.0020, rel=1e-12)
    # Exactly at the target (0.5 * 0.5 = 0.25, all exact in binary): no move.
    at_target = step(state_with(0.0030, initial_entropy=0.5), Aer(update="sign", tau=0.5), seen(0.25))
    assert at_target.state.alpha == 0.0030


def test_pi():
    # gap = 0.05: I = 0.002 + 0.01 * 0.05 = 0.0025; alpha = 0.0025 + 0.3 * 0.05 = 0.0175, whatever alpha was.
    config = Aer(update="pi", eta=0.01, k_p=0.3)
    decision = step(state_with(0.04, integral=0.002), config, seen(0.31))
    assert decision.state.integral == pytest.approx(0.0025, rel=1e-12)
    assert decision.state.alpha == pytest.approx(0.0175, rel=1e-12)
    # gap = -0.1: I = 0.002 - 0.001 = 0.001; alpha = 0.001 - 0.03 < 0, clipped; I keeps its own value.
    above = step(state_with(0.04, integral=0.002), config, seen(0.46))
    assert above.state.integral == pytest.approx(0.001, rel=1e-12)
    assert above.state.alpha == 0.0


def test_skywork():
    # target 0.2, delta 1e-4, c in [0, 0.005], the bonus only while H < target.
    config = Skywork()
    start = state_with(0.0010, initial_entropy=None)
    assert step(start, config, seen(0.15)).target == 0.2
    assert step(start, config, seen(0.15)).state.alpha == pytest.approx(0.0011, rel=1e-12)
    assert step(start, config, seen(0.25)).state.alpha == pytest.approx(0.0009, rel=1e-12)
    assert step(start, config, seen(0.2)).state.alpha == pytest.approx(0.0009, rel=1e-12)  # not below
    assert step(state_with(0.00495), config, seen(0.15)).state.alpha == 0.005
    assert step(state_with(0.00005), config, seen(0.25)).state.alpha == 0.0
    assert config.loss_coefficient(0.0010, 0.199) == 0.0010
    assert config.loss_coefficient(0.0010, 0.2) == 0.0
    assert config.loss_coefficient(0.0010, math.nan) == 0.0
    assert step(start, config, seen(0.15)).coefficient == pytest.approx(0.0011, rel=1e-12)
    assert step(start, config, seen(0.25)).coefficient == 0.0


def test_none_and_fixed_leave_alpha_and_report_the_reference():
    fixed = step(state_with(0.001), Fixed(), seen(0.31))
    assert fixed.state.alpha == 0.001
    assert fixed.reason == "alpha 0.001 fixed: H 0.31 below reference 0.36"
    none = step(state_with(0.0), NoBonus(), seen(0.5))
    assert none.reason == "no coefficient: H 0.5 above reference 0.36"


def test_rate_limit():
    # proposed 0.0031 + 0.006 * 0.05 = 0.0034, moved at most 0.0001 from 0.0031.
    decision = step(state_with(0.0031), Aer(eta=0.006, max_change=0.0001), seen(0.31))
    assert decision.state.alpha == pytest.approx(0.0032, rel=1e-12)
    assert decision.reason == "alpha 0.0031 -> 0.0032: H 0.31 below target 0.36; 0.0034 limited to a change of 0.0001"
    # down: 0.003 - 0.006 * 0.3 = 0.0012, moved at most 0.0001.
    down = step(state_with(0.003), Aer(eta=0.006, max_change=0.0001), seen(0.66))
    assert down.state.alpha == pytest.approx(0.0029, rel=1e-12)


def test_the_hard_bound_beats_the_rate_limit():
    # A checkpoint at 0.04 continued with alpha_max = 0.01: the bound holds at once, in one step.
    config = Aer(eta=0.006, alpha_max=0.01, max_change=0.0001)
    assert step(state_with(0.04), config, seen(0.31)).state.alpha == 0.01


def test_anti_windup_freezes_the_integrator_below_the_floor_only():
    config = Aer(eta=0.006, difficulty_floor=0.02)
    frozen = step(state_with(0.0031), config, seen(0.31, difficulty_mean=0.019))
    assert frozen.frozen
    assert frozen.state == ControllerState(8, 0.0031, 0.0, 0.9, 0, 1)
    assert frozen.reason.endswith("; integrator frozen: mean difficulty 0.019 below 0.02")
    assert not step(state_with(0.0031), config, seen(0.31, difficulty_mean=0.02)).frozen
    # pi: I stays 0.002, the proportional term still acts: alpha = 0.002 + 0.3 * 0.05 = 0.017.
    pi = Aer(update="pi", eta=0.01, k_p=0.3)
    frozen_pi = step(state_with(0.04, integral=0.002), pi, seen(0.31, difficulty_mean=0.0))
    assert frozen_pi.state.integral == 0.002
    assert frozen_pi.state.alpha == pytest.approx(0.017, rel=1e-12)


def test_alarms_name_step_entropy_target_and_alpha():
    # collapse below 0.7 * 0.36 = 0.252; explosion above 1.5 * 0.9 = 1.35.
    config = Fixed()
    low = step(state_with(0.001), config, seen(0.25)).alarm
    assert low == "entropy collapse at step 8: H 0.25, H* 0.36, alpha 0.001; H is below 0.7 of the target"
    high = step(state_with(0.001), config, seen(1.4)).alarm
    assert high == ("entropy explosion at step 8: H 1.4, H* 0.36, alpha 0.001; H is above 1.5 times the initial 0.9")
    assert step(state_with(0.001), config, seen(0.26)).alarm is None
    assert step(state_with(0.001), config, seen(1.34)).alarm is None
    silent = Fixed(alarm_low=0, alarm_high=0)
    assert step(state_with(0.001), silent, seen(0.0)).alarm is None
    assert step(state_with(0.001), silent, seen(9.0)).alarm is None


@pytest.mark.parametrize("rule", [Aer(), Fixed(), Skywork(), NoBonus()])
def test_an_unusable_statistic_holds_alpha_and_marks_the_step(rule):
    decision = step(state_with(0.0031), rule, Observation(math.nan, 10.0, 0.5))
    assert decision.state == ControllerState(8, 0.0031, 0.0, 0.9, 1, 0)
    assert decision.held and decision.alarm is None
    assert decision.reason == "alpha 0.0031 held: unusable entropy statistic, sum nan over 10 tokens"


def test_a_rule_that_steers_holds_without_target_or_difficulty():
    unanchored = step(state_with(0.0, initial_entropy=None), NoTarget(), seen(0.3))
    assert unanchored.held and unanchored.reason == "alpha 0 held: the rule has no target"
    no_difficulty = step(state_with(0.0031), Aer(), seen(0.3, difficulty_mean=math.nan))
    assert no_difficulty.held and no_difficulty.state.alpha == 0.0031
    # A clearly negative mean is a broken statistic; rounding just below zero is a collapsed policy.
    assert step(state_with(0.0031), Aer(), seen(-0.5)).held
    assert step(state_with(0.0031), Aer(), seen(-1e-6)).alarm is not None


def test_loss_coefficient_by_rule():
    state = state_with(0.0031)
    at_target = seen(0.25)
    state = replace(state, initial_entropy=0.5)
    assert step(state, Aer(tau=0.5), at_target).coefficient == 0.0031
    assert step(state, Fixed(coefficient=0.02), at_target).coefficient == 0.02
    assert step(state, NoBonus(), at_target).coefficient == 0.0
    for rule in (Aer(shadow=True), Skywork(shadow=True)):
        assert step(state, rule, seen(0.1)).coefficient == 0.0


def test_shadow_computes_what_the_controller_would_do():
    live = step(state_with(0.0031), Aer(eta=0.006), seen(0.31))
    shadow = step(state_with(0.0031), Aer(eta=0.006, shadow=True), seen(0.31))
    assert shadow.state == live.state
    assert shadow.reason == f"shadow, the loss uses 0: {live.reason}"


def test_the_entropy_gradient_is_a_matter_of_the_rule_never_of_a_value():
    assert Aer().acts  # although alpha_0 = 0
    assert Fixed(coefficient=0.0).acts
    assert Skywork().acts
    assert not NoBonus().acts
    assert not Aer(shadow=True).acts


def test_state_table_rejects_what_it_does_not_know():
    table = state_to_dict(state_with(0.1))
    assert json.loads(json.dumps(table)) == table
    with pytest.raises(ValueError, match="lacks alpha"):
        state_from_dict({key: value for key, value in table.items() if key != "alpha"})
    with pytest.raises(ValueError, match="unknown keys beta"):
        state_from_dict({**table, "beta": 1.0})
    for key, value in [
        ("step", 1.5),
        ("step", True),
        ("alpha", "0.1"),
        ("alpha", math.nan),
        ("held_steps", -1),
    ]:
        with pytest.raises(ValueError, match=f"{key}="):
            state_from_dict({**table, key: value})


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (Wild(proposed=math.nan), "proposed alpha=nan; it must be finite and >= 0"),
        (Wild(proposed=-0.1), "proposed alpha=-0.1"),
        (Wild(used=math.inf), "gives coefficient=inf"),
        (Wild(told=math.nan), "finite"),
        (Wild(told=-1.0), r"reports .*untold.* among \['told'\]"),
    ],
)
def test_what_a_rule_returns_is_checked(rule, words):
    with pytest.raises(ValueError, match=rf"algo\.entropy\.kind='aer' .*{words}"):
        step(state_with(0.1), rule, seen(0.3))


def test_a_rules_own_numbers_come_with_the_decision():
    assert step(state_with(0.1), Wild(told=3.0), seen(0.3)).reported == {"told": (3.0, 1.0)}
    assert step(state_with(0.1), Aer(), seen(0.3)).reported == {}


# In closed loop with the simplest plant: entropy integrates the coefficient
#
# H_next = H + b (alpha - a). Away from the bounds the error recursion of ``proportional`` is
#
#     e' = (1 - b eta) e - b alpha,  alpha' = alpha + eta e      (alpha counted from a)
#
# with determinant 1: it circles and never settles. ``pi`` has the determinant 1 - b k_p.

PLANT_GAIN = 2.0  # b, nats per step and unit of alpha
BALANCE = 0.02  # a, the coefficient that just stops the collapse
TARGET = 0.4


def error_trace(config: EntropyRule, num_steps: int, *, difficulty_mean: float = 0.5) -> list[float]:
    """Returns H* - H per step, from H = 0.5 with H_0 = 1."""
    state = replace(initial_state(config), initial_entropy=1.0)
    entropy = 0.5
    errors = []
    for _ in range(num_steps):
        errors.append(TARGET - entropy)
        state = step(state, config, Observation(entropy, 1.0, difficulty_mean)).state
        entropy = max(entropy + PLANT_GAIN * (state.alpha - BALANCE), 0.0)
    return errors


def test_pi_settles_where_integral_action_alone_keeps_swinging():
    gains = {"tau": TARGET, "eta": 0.01, "alpha_max": 1.0}
    swinging = error_trace(Aer(update="proportional", **gains), 400)
    settled = error_trace(Aer(update="pi", k_p=0.3, **gains), 400)
    first_swing, last_swing = max(map(abs, swinging[:100])), max(map(abs, swinging[-100:]))
    assert last_swing > 0.9 * first_swing
    assert max(map(abs, settled[-100:])) < 0.01 * TARGET


def test_without_authority_nothing_is_stored_up():
    config = Aer(tau=TARGET, update="pi", eta=0.01, k_p=0.0, alpha_max=1.0)
    collapsed = error_trace(config, 60, difficulty_mean=0.0)
    assert collapsed[-1] == TARGET  # H fell to 0, and alpha never left 0 for want of difficulty


# Laws that hold for any input

any_float = st.floats(allow_nan=True, allow_infinity=True)
nats = st.floats(0, 12)
updates = st.sampled_from(["proportional", "sign", "pi"])


limits = st.one_of(st.just(0.0), st.floats(1e-9, 0.1))
bounds = st.floats(1e-6, 1)
aer_rules = st.builds(
    Aer,
    update=updates,
    tau=st.floats(0.05, 2),
    eta=st.floats(1e-6, 10),
    k_p=st.floats(0, 10),
    alpha_max=bounds,
    max_change=limits,
)
rules = st.one_of(aer_rules, st.builds(Skywork, alpha_max=bounds, max_change=limits))


@st.composite
def states(draw, config):
    return ControllerState(
        step=draw(st.integers(0, 10**6)),
        alpha=draw(st.floats(0, config.alpha_max)),
        integral=draw(st.floats(0, config.alpha_max)),
        initial_entropy=draw(nats),
        held_steps=0,
        frozen_steps=0,
    )


@given(st.data(), st.lists(st.tuples(any_float, any_float, any_float), max_size=8))
def test_alpha_stays_within_its_bounds_whatever_is_observed(data, observations):
    config = data.draw(rules)
    state = initial_state(config)
    for entropy_sum, count, difficulty_mean in observations:
        observation = Observation(entropy_sum, count, difficulty_mean)
        before = state
        decision = step(state, config, observation)
        state = decision.state
        assert 0 <= state.alpha <= config.alpha_max
        assert 0 <= state.integral <= config.alpha_max
        assert state.step == before.step + 1
        assert decision.reason
        if config.max_change:
            assert abs(state.alpha - before.alpha) <= config.max_change * (1 + 1e-9)
        if decision.held:
            assert (state.alpha, state.integral) == (before.alpha, before.integral)
            assert state.held_steps == before.held_steps + 1


@given(st.data(), st.one_of(st.just(math.nan), st.just(math.inf), st.just(-math.inf)), st.booleans())
def test_a_statistic_that_is_not_finite_holds_alpha(data, bad, in_count):
    config = data.draw(rules)
    state = data.draw(states(config))
    decision = step(state, config, Observation(1.0, bad, 0.5) if in_count else Observation(bad, 5.0, 0.5))
    assert decision.held
    assert (decision.state.alpha, decision.state.integral) == (state.alpha, state.integral)


@given(st.data(), updates)
def test_the_target_is_a_fixed_point(data, rule):
    config = Aer(update=rule, k_p=0.3)
    state = data.draw(states(config))
    if rule == "pi":  # in steady state alpha is the integral
        state = ControllerState(state.step, state.integral, state.integral, state.initial_entropy, 0, 0)
    decision = step(state, config, seen(config.target_entropy(state.initial_entropy)))
    assert decision.state.alpha == state.alpha
    assert decision.state.integral == state.integral


@given(st.data(), nats, nats)
def test_alpha_never_falls_when_the_gap_grows(data, one, other):
    config = data.draw(rules)
    state = data.draw(states(config))
    low, high = sorted((one, other))
    assert step(state, config, seen(low)).state.alpha >= step(state, config, seen(high)).state.alpha


@given(st.data(), nats, updates)
def test_alpha_moves_towards_the_target(data, entropy, rule):
    config = Aer(update=rule, k_p=0.0)
    state = data.draw(states(config))
    if rule == "pi":
        state = ControllerState(state.step, state.integral, state.integral, state.initial_entropy, 0, 0)
    after = step(state, config, seen(entropy)).state.alpha
    target = config.target_entropy(state.initial_entropy)
    assert after >= state.alpha if entropy < target else after <= state.alpha


@given(st.data(), nats, st.floats(0, 0.0199), st.integers(1, 50))
def test_the_integrator_does_not_wind_up_without_authority(data, entropy, difficulty_mean, steps):
    config = data.draw(aer_rules)
    state = start = data.draw(states(config))
    for _ in range(steps):
        decision = step(state, config, seen(entropy, difficulty_mean=difficulty_mean))
        assert decision.frozen
        state = decision.state
    assert state.integral == start.integral
    assert state.frozen_steps == start.frozen_steps + steps
    if config.update != "pi":
        assert state.alpha == start.alpha


@given(st.data(), nats)
def test_update_is_pure(data, entropy):
    config = data.draw(rules)
    state = data.draw(states(config))
    assert step(state, config, seen(entropy)) == step(state, config, seen(entropy))


@given(st.data(), st.booleans())
def test_state_survives_json_bit_for_bit(data, anchored):
    state = data.draw(states(Aer()))
    if not anchored:
        state = ControllerState(state.step, state.alpha, state.integral, None, 3, 4)
    back = state_from_dict(json.loads(json.dumps(state_to_dict(state))))
    assert back == state
    assert math.copysign(1, back.alpha) == math.copysign(1, state.alpha)

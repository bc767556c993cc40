"""Laws that the controller keeps for any input."""

from __future__ import annotations

import json
import math

from hypothesis import given
from hypothesis import strategies as st

from aer_megatron.algo.controller import (
    ControllerState,
    Observation,
    initial_state,
    state_from_dict,
    state_to_dict,
    step,
)
from aer_megatron.algo.entropy_rules.aer import Aer
from aer_megatron.algo.entropy_rules.skywork import Skywork

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


def observed(entropy: float, *, difficulty_mean: float = 0.5, tokens: float = 1.0) -> Observation:
    return Observation(entropy * tokens, tokens, difficulty_mean)


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
    decision = step(state, config, observed(config.target_entropy(state.initial_entropy)))
    assert decision.state.alpha == state.alpha
    assert decision.state.integral == state.integral


@given(st.data(), nats, nats)
def test_alpha_never_falls_when_the_gap_grows(data, one, other):
    config = data.draw(rules)
    state = data.draw(states(config))
    low, high = sorted((one, other))
    assert step(state, config, observed(low)).state.alpha >= step(state, config, observed(high)).state.alpha


@given(st.data(), nats, updates)
def test_alpha_moves_towards_the_target(data, entropy, rule):
    config = Aer(update=rule, k_p=0.0)
    state = data.draw(states(config))
    if rule == "pi":
        state = ControllerState(state.step, state.integral, state.integral, state.initial_entropy, 0, 0)
    after = step(state, config, observed(entropy)).state.alpha
    target = config.target_entropy(state.initial_entropy)
    assert after >= state.alpha if entropy < target else after <= state.alpha


@given(st.data(), nats, st.floats(0, 0.0199), st.integers(1, 50))
def test_the_integrator_does_not_wind_up_without_authority(data, entropy, difficulty_mean, steps):
    config = data.draw(aer_rules)
    state = start = data.draw(states(config))
    for _ in range(steps):
        decision = step(state, config, observed(entropy, difficulty_mean=difficulty_mean))
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
    assert step(state, config, observed(entropy)) == step(state, config, observed(entropy))


@given(st.data(), st.booleans())
def test_state_survives_json_bit_for_bit(data, anchored):
    state = data.draw(states(Aer()))
    if not anchored:
        state = ControllerState(state.step, state.alpha, state.integral, None, 3, 4)
    back = state_from_dict(json.loads(json.dumps(state_to_dict(state))))
    assert back == state
    assert math.copysign(1, back.alpha) == math.copysign(1, state.alpha)

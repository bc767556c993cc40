"""Laws that the controller keeps for any input."""

from __future__ import annotations

import json
import math

from hypothesis import given
from hypothesis import strategies as st

from aer_megatron.algo.controller import (
    ControllerState,
    Observation,
    anchor,
    initial_state,
    state_from_dict,
    state_to_dict,
    target_entropy,
    update,
)
from aer_megatron.algo.options import EntropySection

any_float = st.floats(allow_nan=True, allow_infinity=True)
nats = st.floats(0, 12)
kinds = st.sampled_from(["aer", "skywork"])
updates = st.sampled_from(["proportional", "sign", "pi"])


@st.composite
def configs(draw):
    return EntropySection(
        kind=draw(kinds),
        update=draw(updates),
        tau=draw(st.floats(0.05, 2)),
        eta=draw(st.floats(1e-6, 10)),
        k_p=draw(st.floats(0, 10)),
        alpha_max=draw(st.floats(1e-6, 1)),
        max_change=draw(st.one_of(st.just(0.0), st.floats(1e-9, 0.1))),
    )


@st.composite
def states(draw, config):
    upper = config.skywork_max if config.kind == "skywork" else config.alpha_max
    return ControllerState(
        step=draw(st.integers(0, 10**6)),
        alpha=draw(st.floats(0, upper)),
        integral=draw(st.floats(0, config.alpha_max)),
        initial_entropy=draw(nats),
        held_steps=0,
        frozen_steps=0,
    )


def observed(entropy: float, *, difficulty_mean: float = 0.5, tokens: float = 1.0) -> Observation:
    return Observation(entropy * tokens, tokens, difficulty_mean)


@given(st.data(), st.lists(st.tuples(any_float, any_float, any_float), max_size=8))
def test_alpha_stays_within_its_bounds_whatever_is_observed(data, observations):
    config = data.draw(configs())
    upper = config.skywork_max if config.kind == "skywork" else config.alpha_max
    state = initial_state(config)
    for entropy_sum, count, difficulty_mean in observations:
        observation = Observation(entropy_sum, count, difficulty_mean)
        state = anchor(state, config, observation)
        before = state
        decision = update(state, config, observation)
        state = decision.state
        assert 0 <= state.alpha <= upper
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
    config = data.draw(configs())
    state = data.draw(states(config))
    decision = update(state, config, Observation(1.0, bad, 0.5) if in_count else Observation(bad, 5.0, 0.5))
    assert decision.held
    assert (decision.state.alpha, decision.state.integral) == (state.alpha, state.integral)


@given(st.data(), updates)
def test_the_target_is_a_fixed_point(data, rule):
    config = EntropySection(update=rule, k_p=0.3)
    state = data.draw(states(config))
    if rule == "pi":  # in steady state alpha is the integral
        state = ControllerState(state.step, state.integral, state.integral, state.initial_entropy, 0, 0)
    decision = update(state, config, observed(target_entropy(state, config)))
    assert decision.state.alpha == state.alpha
    assert decision.state.integral == state.integral


@given(st.data(), nats, nats)
def test_alpha_never_falls_when_the_gap_grows(data, one, other):
    config = data.draw(configs())
    state = data.draw(states(config))
    low, high = sorted((one, other))
    assert update(state, config, observed(low)).state.alpha >= update(state, config, observed(high)).state.alpha


@given(st.data(), nats, updates)
def test_alpha_moves_towards_the_target(data, entropy, rule):
    config = EntropySection(update=rule, k_p=0.0)
    state = data.draw(states(config))
    if rule == "pi":
        state = ControllerState(state.step, state.integral, state.integral, state.initial_entropy, 0, 0)
    after = update(state, config, observed(entropy)).state.alpha
    target = target_entropy(state, config)
    assert after >= state.alpha if entropy < target else after <= state.alpha


@given(st.data(), nats, st.floats(0, 0.0199), st.integers(1, 50))
def test_the_integrator_does_not_wind_up_without_authority(data, entropy, difficulty_mean, steps):
    config = data.draw(configs().filter(lambda item: item.kind == "aer"))
    state = start = data.draw(states(config))
    for _ in range(steps):
        decision = update(state, config, observed(entropy, difficulty_mean=difficulty_mean))
        assert decision.frozen
        state = decision.state
    assert state.integral == start.integral
    assert state.frozen_steps == start.frozen_steps + steps
    if config.update != "pi":
        assert state.alpha == start.alpha


@given(st.data(), nats)
def test_update_is_pure(data, entropy):
    config = data.draw(configs())
    state = data.draw(states(config))
    assert update(state, config, observed(entropy)) == update(state, config, observed(entropy))


@given(st.data(), st.booleans())
def test_state_survives_json_bit_for_bit(data, anchored):
    state = data.draw(states(EntropySection()))
    if not anchored:
        state = ControllerState(state.step, state.alpha, state.integral, None, 3, 4)
    back = state_from_dict(json.loads(json.dumps(state_to_dict(state))))
    assert back == state
    assert math.copysign(1, back.alpha) == math.copysign(1, state.alpha)

"""The clamped entropy of examples/extend against numbers derived by hand; tests/integration trains with it."""

from __future__ import annotations

import math

import pytest

from aer_megatron.algo import controller
from aer_megatron.algo.controller import ControllerState, Observation
from aer_megatron.algo.entropy_rules.base import EntropyRule
from aer_megatron.config_loading import load_config

OPTIONS = [
    "--model.path=base",
    "--data.train.task=countdown",
    "--algo.entropy.kind=examples.extend.clamped_entropy:ClampedEntropy",
]


def rule(*overrides: str) -> EntropyRule:
    return load_config(None, [*OPTIONS, *(f"--algo.entropy.{text}" for text in overrides)]).algo.entropy


@pytest.mark.parametrize(
    ("entropy", "alpha", "coefficient", "inside"),
    [
        (0.1, 0.02, 0.02, 0.0),  # 0.01 + 0.1 * (0.2 - 0.1)
        (0.2, 0.01, 0.01, 1.0),
        (0.5, 0.01, 0.01, 1.0),
        (0.6, 0.01, 0.01, 1.0),
        (0.65, 0.005, 0.0, 0.0),  # 0.01 - 0.1 * 0.05, and no bonus above the band
        (0.9, 0.0, 0.0, 0.0),
    ],
)
def test_alpha_moves_outside_the_band_alone(entropy: float, alpha: float, coefficient: float, inside: float) -> None:
    state = ControllerState(step=3, alpha=0.01, integral=0.0, initial_entropy=0.9, held_steps=0, frozen_steps=0)
    decision = controller.step(state, rule("gain=0.1"), Observation(entropy * 100, 100.0, 0.0))
    assert decision.state.alpha == pytest.approx(alpha, abs=1e-15)
    assert decision.coefficient == pytest.approx(coefficient, abs=1e-15)
    assert decision.reported == {"inside_band": (inside, 1.0)}
    assert decision.target == 0.2 and not decision.frozen


def test_the_guards_of_the_controller_hold_for_it() -> None:
    state = controller.initial_state(rule())
    assert controller.step(state, rule(), Observation(math.nan, 100.0, 0.5)).held
    assert controller.step(state, rule(), Observation(10.0, 100.0, 0.5, mismatch_kl=1.0)).held
    limited = controller.step(state, rule("gain=1", "max_change=0.001"), Observation(10.0, 100.0, 0.5))
    assert limited.state.alpha == 0.001
    assert controller.step(state, rule("gain=9"), Observation(10.0, 100.0, 0.5)).state.alpha == 0.05  # alpha_max
    assert controller.step(state, rule("gain=9", "shadow=true"), Observation(10.0, 100.0, 0.5)).coefficient == 0


def test_its_options_are_checked() -> None:
    with pytest.raises(ValueError, match=r"low=0\.7 must be below high=0\.6"):
        rule("low=0.7")
    with pytest.raises(ValueError, match=r"unknown option algo\.entropy\.hihg: did you mean algo\.entropy\.high"):
        rule("hihg=0.7")
    with pytest.raises(ValueError, match=r"algo\.entropy\.tau is not one of kind='examples\.extend\.clamped_entropy"):
        rule("tau=0.7")

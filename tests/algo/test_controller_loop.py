"""The controller in closed loop with the simplest plant: entropy integrates the coefficient.

H_next = H + b (alpha - a). Away from the bounds the error recursion of ``proportional`` is

    e' = (1 - b eta) e - b alpha,  alpha' = alpha + eta e      (alpha counted from a)

with determinant 1: it circles and never settles. ``pi`` has the determinant 1 - b k_p.
"""

from __future__ import annotations

from dataclasses import replace

from aer_megatron.algo.controller import Observation, initial_state, step
from aer_megatron.algo.entropy_rules.aer import Aer
from aer_megatron.algo.entropy_rules.base import EntropyRule

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

"""The entropy controller: one frozen state, one pure update, and the coefficient that the loss uses.

    Observation (sums of a rollout batch) --update--> Decision (next state, reason, alarm)
                                                          |--loss_coefficient--> loss

Symbols, as in docs/aer.md: H is the token-mean ``token_entropy`` of the rollout batch (nats), H_0 that of the
first batch, H* = tau * H_0 the target, d the difficulty of a prompt, alpha the global coefficient.

Everything here is Python floats, identical on every rank because the observation is. This file does NOT
reduce over ranks, read tensors, write metrics or decide when it is called.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from aer_megatron.algo.options import EntropySection

# A mean entropy this far below zero is rounding of a fp32 softmax; anything lower is a broken statistic.
_NEGATIVE_ROUNDING_NATS = 1e-4


@dataclass(frozen=True, slots=True)
class ControllerState:
    """All that the controller remembers; checkpointed as one table.

    Example: ``ControllerState(step=12, alpha=0.0031, integral=0.0, initial_entropy=0.9, held_steps=0,
    frozen_steps=2)``. ``integral`` is I of the ``pi`` update and stays 0 under every other rule.
    """

    step: int  # updates so far
    alpha: float
    integral: float
    initial_entropy: float | None  # H_0 in nats; None until the anchor
    held_steps: int  # updates refused: no usable statistic, or a mismatch above its bound
    frozen_steps: int  # updates in which anti-windup stopped the integrator


@dataclass(frozen=True, slots=True)
class Observation:
    """What one rollout batch shows, reduced over all ranks.

    ``entropy_sum`` and ``token_count`` run over ALL sampled tokens, unweighted by difficulty.
    ``difficulty_mean`` is the mean over prompts of d BEFORE any normalisation: divided by its mean it would
    always be 1 and hide lost authority. ``mismatch_kl`` is ``algo.mismatch.Mismatch.kl`` of the batch; 0 stands for an
    engine that agrees with the trainer, and for recordings made before it was measured.
    """

    entropy_sum: float
    token_count: float
    difficulty_mean: float
    mismatch_kl: float = 0.0  # nats per token

    @property
    def token_mean(self) -> float:
        """H in nats, as it was measured; NaN without tokens."""
        return self.entropy_sum / self.token_count if self.token_count else math.nan


@dataclass(frozen=True, slots=True)
class Decision:
    """The next state with what is to be said about it."""

    state: ControllerState
    reason: str  # one readable line, always present
    alarm: str | None
    held: bool
    frozen: bool


def initial_state(config: EntropySection) -> ControllerState:
    """Returns the state before the first rollout batch: alpha_0 = 0, or the constant of ``fixed``."""
    alpha = config.coefficient if config.kind == "fixed" else 0.0
    return ControllerState(step=0, alpha=alpha, integral=0.0, initial_entropy=None, held_steps=0, frozen_steps=0)


def anchor(state: ControllerState, config: EntropySection, observation: Observation) -> ControllerState:
    """Returns ``state`` with H_0 set from the first usable observation; later calls return ``state`` itself.

    An unusable statistic (non-finite, no tokens) or a mismatch above its bound leaves ``state`` as it is, so that the
    next batch may anchor. Source: "initial-anchored target entropy", the second component of arXiv 2510.10959.
    """
    entropy = _token_mean(observation)
    if state.initial_entropy is not None or entropy is None or _mismatched(config, observation):
        return state
    return replace(state, initial_entropy=entropy)


def target_entropy(state: ControllerState, config: EntropySection) -> float:
    """Returns H* in nats: ``skywork_target`` for skywork, else tau * H_0; NaN before the anchor.

    ``none`` and ``fixed`` steer by no target; theirs is the same tau * H_0, reported as the reference.
    """
    if config.kind == "skywork":
        return config.skywork_target
    if state.initial_entropy is None:
        return math.nan
    return config.tau * state.initial_entropy


def update(state: ControllerState, config: EntropySection, observation: Observation) -> Decision:
    """Returns the decision after one rollout batch; pure, the same inputs give the same bits.

    ``aer`` moves alpha by ``config.update`` towards H = H*, ``skywork`` by a constant step, ``fixed`` and
    ``none`` leave it. A statistic that is missing or not finite holds alpha, and so does a mismatch between rollout
    engine and trainer above ``config.mismatch_bound``. Formulas and their provenance: docs/aer.md.
    """
    entropy = _token_mean(observation)
    target = target_entropy(state, config)
    problem = _unusable(config, observation, entropy, target)
    if entropy is None or problem is not None:
        held = replace(state, step=state.step + 1, held_steps=state.held_steps + 1)
        return Decision(held, _with_shadow(config, f"alpha {state.alpha:.4g} held: {problem}"), None, True, False)

    frozen = config.kind == "aer" and observation.difficulty_mean < config.difficulty_floor
    proposed, integral = _propose(state, config, target - entropy, frozen)
    limited = _rate_limited(state.alpha, proposed, config.max_change)
    alpha = min(limited, _upper_bound(config))  # the hard bound has the last word
    following = replace(
        state,
        step=state.step + 1,
        alpha=alpha,
        integral=integral,
        frozen_steps=state.frozen_steps + int(frozen),
    )
    reason = _reason(state, following, config, entropy, target)
    if frozen:
        reason += f"; integrator frozen: mean difficulty {observation.difficulty_mean:.4g} below "
        reason += f"{config.difficulty_floor:.4g}"
    if alpha != proposed:
        reason += f"; {proposed:.4g} limited to a change of {config.max_change:.4g}"
    return Decision(following, reason, _alarm(following, config, entropy, target), False, frozen)


def loss_coefficient(state: ControllerState, config: EntropySection, token_entropy: float) -> float:
    """Returns the coefficient that multiplies d(q) * H in the loss of this step.

    Args:
        token_entropy: token-mean entropy of the current rollout batch in nats; only skywork reads it, because
            its bonus applies only while H is below the target (a NaN therefore switches it off).
    """
    if config.shadow or config.kind == "none":
        return 0.0
    if config.kind == "skywork":
        return state.alpha if token_entropy < config.skywork_target else 0.0
    return config.coefficient if config.kind == "fixed" else state.alpha


def needs_entropy_gradient(config: EntropySection) -> bool:
    """Returns whether the loss needs a gradient through the entropy under this rule.

    Decided by the rule and never by a coefficient's value: alpha starts at 0 and grows, and one step built
    without the graph would be a step that the controller believes it acted in.
    """
    return config.kind != "none" and not config.shadow


def state_to_dict(state: ControllerState) -> dict[str, int | float | None]:
    """Returns the state as a table of JSON scalars; JSON floats are written by repr, so nothing is lost."""
    return {item.name: getattr(state, item.name) for item in fields(state)}


def state_from_dict(table: Mapping[str, object]) -> ControllerState:
    """Returns the state written by ``state_to_dict``.

    Raises:
        ValueError: a key is missing or unknown, or a value has the wrong type, is negative or is not finite.
    """
    known = {item.name for item in fields(ControllerState)}
    if not isinstance(table, Mapping):
        raise ValueError(f"controller state is a {type(table).__name__}, not a table; it is not from a checkpoint")
    if missing := sorted(known - table.keys()):
        raise ValueError(f"controller state lacks {', '.join(missing)}; it is not from a complete checkpoint")
    if unknown := sorted(table.keys() - known):
        raise ValueError(f"controller state has unknown keys {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    initial_entropy = table["initial_entropy"]
    return ControllerState(
        step=_count(table, "step"),
        alpha=_real(table, "alpha"),
        integral=_real(table, "integral"),
        initial_entropy=None if initial_entropy is None else _real(table, "initial_entropy"),
        held_steps=_count(table, "held_steps"),
        frozen_steps=_count(table, "frozen_steps"),
    )


def _token_mean(observation: Observation) -> float | None:
    """Returns the token-mean entropy in nats, or None where the statistic is unusable."""
    if not observation.token_count > 0 or not math.isfinite(observation.token_count):
        return None
    mean = observation.entropy_sum / observation.token_count
    if not math.isfinite(mean) or mean < -_NEGATIVE_ROUNDING_NATS:
        return None
    return max(mean, 0.0)


def _mismatched(config: EntropySection, observation: Observation) -> bool:
    """Returns whether the batch comes from a policy too far from the trained one to steer by; a NaN counts as far."""
    return config.mismatch_bound > 0 and not observation.mismatch_kl <= config.mismatch_bound


def _unusable(config: EntropySection, observation: Observation, entropy: float | None, target: float) -> str | None:
    """Returns why ``update`` must hold alpha, or None."""
    if entropy is None:
        total, count = observation.entropy_sum, observation.token_count
        return f"unusable entropy statistic, sum {total:.4g} over {count:.4g} tokens"
    if config.kind in ("aer", "skywork") and _mismatched(config, observation):
        kl, bound = observation.mismatch_kl, config.mismatch_bound
        return f"mismatch, KL {kl:.4g} nats between rollout engine and trainer above {bound:.4g}"
    if config.kind in ("aer", "skywork") and not math.isfinite(target):
        return "no target yet, the initial entropy is not anchored"
    if config.kind == "aer" and not math.isfinite(observation.difficulty_mean):
        return f"unusable mean difficulty {observation.difficulty_mean:.4g}"
    return None


def _propose(state: ControllerState, config: EntropySection, gap: float, frozen: bool) -> tuple[float, float]:
    """Returns (alpha, integral) of the rule before the rate limit; ``gap`` = H* - H.

    proportional and sign: arXiv 2510.10959 as reconstructed in docs/aer.md; pi: ours; skywork: Skywork-OR1.
    """
    if config.kind == "skywork":
        step = config.skywork_delta if gap > 0 else -config.skywork_delta
        return _clip(state.alpha + step, config.skywork_max), state.integral
    if config.kind != "aer":
        return state.alpha, state.integral
    if config.update == "pi":
        # The proportional term stays on while frozen: it remembers nothing, so it cannot wind up.
        integral = state.integral if frozen else _clip(state.integral + config.eta * gap, config.alpha_max)
        return _clip(integral + config.k_p * gap, config.alpha_max), integral
    if frozen:
        return state.alpha, state.integral
    direction = float((gap > 0) - (gap < 0)) if config.update == "sign" else gap
    return _clip(state.alpha + config.eta * direction, config.alpha_max), state.integral


def _upper_bound(config: EntropySection) -> float:
    if config.kind == "skywork":
        return config.skywork_max
    return config.alpha_max if config.kind == "aer" else math.inf


def _clip(value: float, upper: float) -> float:
    return min(max(value, 0.0), upper)


def _rate_limited(alpha: float, proposed: float, max_change: float) -> float:
    """Returns ``proposed`` moved to at most ``max_change`` from ``alpha``; 0 = no limit."""
    if max_change == 0 or abs(proposed - alpha) <= max_change:
        return proposed
    if proposed > alpha:
        return min(alpha + max_change, proposed)  # min and max: rounding must not step over the proposal
    return max(alpha - max_change, proposed)


def _reason(
    before: ControllerState, after: ControllerState, config: EntropySection, entropy: float, target: float
) -> str:
    """Returns e.g. ``alpha 0.0031 -> 0.0034: H 0.31 below target 0.36``."""
    side = "below" if entropy < target else "above" if entropy > target else "at"
    if config.kind in ("none", "fixed"):
        rule = "no coefficient" if config.kind == "none" else f"alpha {after.alpha:.4g} fixed"
        if math.isnan(target):
            return _with_shadow(config, f"{rule}: H {entropy:.4g}, no reference yet")
        return _with_shadow(config, f"{rule}: H {entropy:.4g} {side} reference {target:.4g}")
    change = f"alpha {before.alpha:.4g} -> {after.alpha:.4g}: H {entropy:.4g} {side} target {target:.4g}"
    if after.alpha == _upper_bound(config):
        change += f"; at the upper bound {after.alpha:.4g}"
    return _with_shadow(config, change)


def _with_shadow(config: EntropySection, text: str) -> str:
    return f"shadow, the loss uses 0: {text}" if config.shadow else text


def _alarm(state: ControllerState, config: EntropySection, entropy: float, target: float) -> str | None:
    """Returns the collapse or explosion alarm of this step, or None; a threshold of 0 is off."""
    where = f"at step {state.step}: H {entropy:.4g}, H* {target:.4g}, alpha {state.alpha:.4g}"
    if config.alarm_low > 0 and entropy < config.alarm_low * target:
        return f"entropy collapse {where}; H is below {config.alarm_low:.4g} of the target"
    initial = state.initial_entropy
    if config.alarm_high > 0 and initial is not None and entropy > config.alarm_high * initial:
        return f"entropy explosion {where}; H is above {config.alarm_high:.4g} times the initial {initial:.4g}"
    return None


def _count(table: Mapping[str, object], key: str) -> int:
    value = table[key]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError(f"controller state {key}={str(value)[:40]} must be an integer >= 0, below 2^63")
    return value


def _real(table: Mapping[str, object], key: str) -> float:
    value = table[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**1023:
        raise ValueError(f"controller state {key}={str(value)[:40]} must be a finite number >= 0")
    return float(value)

"""The entropy controller: one frozen state and one pure step from it, by an entropy rule.

    state, Observation (sums of a rollout batch) --step--> Decision (next state, coefficient of the loss, reason, alarm)

What a rule wants is in entropy_rules/; what holds for every rule is here: anchor, hold, freeze, rate limit, bound,
alarms. Symbols, as in docs/aer.md: H is the token-mean ``token_entropy`` of the rollout batch (nats), H_0 that of the
first batch, H* the target, d the difficulty of a prompt, alpha the global coefficient.

Everything here is Python floats, identical on every rank because the observation is. This file does NOT
reduce over ranks, read tensors, write metrics or decide when it is called.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

from aer_megatron.algo.entropy_rules.base import EntropyRule, SteeringRule

# A mean entropy this far below zero is rounding of a fp32 softmax; anything lower is a broken statistic.
_NEGATIVE_ROUNDING_NATS = 1e-4


@dataclass(frozen=True, slots=True)
class ControllerState:
    """All that the controller remembers; checkpointed as one table.

    Example: ``ControllerState(step=12, alpha=0.0031, integral=0.0, initial_entropy=0.9, held_steps=0,
    frozen_steps=2)``. ``integral`` is I of the ``pi`` update of ``aer``; rules that keep none leave it.
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
    """The next state, what the loss of this step uses, and what is to be said about it."""

    state: ControllerState
    coefficient: float  # multiplies d(q) H in the loss
    target: float  # H* in nats; NaN without one
    reason: str  # one readable line, always present
    alarm: str | None
    held: bool
    frozen: bool
    reported: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # the rule's own numbers, (sum, count)


def initial_state(rule: EntropyRule) -> ControllerState:
    """Returns the state before the first rollout batch."""
    alpha = rule.initial_alpha()
    return ControllerState(step=0, alpha=alpha, integral=0.0, initial_entropy=None, held_steps=0, frozen_steps=0)


def step(state: ControllerState, rule: EntropyRule, observation: Observation) -> Decision:
    """Returns the decision after one rollout batch; pure, the same inputs give the same bits.

    The first usable observation sets H_0 for good. A statistic that is missing or not finite holds alpha; so does, for
    a rule that steers, a mismatch between rollout engine and trainer above ``mismatch_bound``. Formulas and their
    provenance: docs/aer.md.

    Raises:
        ValueError: a rule returned a number that is not finite, a negative alpha or a report that it did not declare.
    """
    entropy = _token_mean(observation)
    mismatched = rule.mismatch_bound > 0 and not observation.mismatch_kl <= rule.mismatch_bound  # a NaN counts as far
    # an unusable or mismatched batch leaves H_0 open: the next one may anchor it
    if state.initial_entropy is None and entropy is not None and not mismatched:
        state = replace(state, initial_entropy=entropy)
    target = rule.target_entropy(state.initial_entropy)
    problem = _unusable(rule, observation, entropy, target, mismatched=mismatched)
    alarm, frozen = None, False
    if entropy is None or problem is not None:
        following = replace(state, step=state.step + 1, held_steps=state.held_steps + 1)
        reason = f"alpha {state.alpha:.4g} held: {problem}"
    else:
        if isinstance(rule, SteeringRule):
            following, reason, frozen = _steered(state, rule, entropy, target, observation.difficulty_mean)
        else:
            following = replace(state, step=state.step + 1)
            reference = "no reference yet" if math.isnan(target) else f"{_side(entropy, target)} reference {target:.4g}"
            reason = f"{rule.label(state.alpha)}: H {entropy:.4g}" + (", " if math.isnan(target) else " ") + reference
        alarm = _alarm(following, rule, entropy, target)
    if isinstance(rule, SteeringRule) and rule.shadow:
        reason = f"shadow, the loss uses 0: {reason}"
    coefficient = rule.loss_coefficient(following.alpha, observation.token_mean) if rule.acts else 0.0
    reported = rule.report(following.alpha, observation.token_mean)
    _check_returned(rule, coefficient, reported)
    return Decision(following, coefficient, target, reason, alarm, problem is not None, frozen, reported)


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


def _unusable(
    rule: EntropyRule, observation: Observation, entropy: float | None, target: float, *, mismatched: bool
) -> str | None:
    """Returns why alpha must be held, or None."""
    if entropy is None:
        total, count = observation.entropy_sum, observation.token_count
        return f"unusable entropy statistic, sum {total:.4g} over {count:.4g} tokens"
    if not isinstance(rule, SteeringRule):
        return None
    if mismatched:
        kl, bound = observation.mismatch_kl, rule.mismatch_bound
        return f"mismatch, KL {kl:.4g} nats between rollout engine and trainer above {bound:.4g}"
    if not math.isfinite(target):
        return "the rule has no target"
    if rule.freeze_floor() is not None and not math.isfinite(observation.difficulty_mean):
        return f"unusable mean difficulty {observation.difficulty_mean:.4g}"
    return None


def _steered(
    state: ControllerState, rule: SteeringRule, entropy: float, target: float, difficulty_mean: float
) -> tuple[ControllerState, str, bool]:
    """Returns (the state with alpha where the rule, the rate limit and the bound put it, the reason, frozen)."""
    floor, upper = rule.freeze_floor(), rule.upper_bound()
    frozen = floor is not None and difficulty_mean < floor
    proposed, integral = rule.propose(state.alpha, state.integral, entropy, target, frozen=frozen)
    for name, value in (("alpha", proposed), ("integral", integral)):
        if not 0 <= value < math.inf:
            raise ValueError(f"algo.entropy.kind={rule.kind!r} proposed {name}={value}; it must be finite and >= 0")
    alpha = min(_rate_limited(state.alpha, proposed, rule.max_change), upper)  # the hard bound has the last word
    following = replace(
        state,
        step=state.step + 1,
        alpha=alpha,
        integral=integral,
        frozen_steps=state.frozen_steps + int(frozen),
    )
    # e.g. alpha 0.0031 -> 0.0034: H 0.31 below target 0.36
    reason = f"alpha {state.alpha:.4g} -> {alpha:.4g}: H {entropy:.4g} {_side(entropy, target)} target {target:.4g}"
    if alpha == upper:
        reason += f"; at the upper bound {alpha:.4g}"
    if frozen:
        reason += f"; integrator frozen: mean difficulty {difficulty_mean:.4g} below {floor:.4g}"
    if alpha != proposed:
        reason += f"; {proposed:.4g} limited to a change of {rule.max_change:.4g}"
    return following, reason, frozen


def _check_returned(rule: EntropyRule, coefficient: float, reported: Mapping[str, tuple[float, float]]) -> None:
    if not math.isfinite(coefficient):
        raise ValueError(f"algo.entropy.kind={rule.kind!r} gives coefficient={coefficient}; it must be finite")
    finite = all(math.isfinite(number) for pair in reported.values() for number in pair)
    if not (reported.keys() <= set(rule.reports) and finite):
        raise ValueError(
            f"algo.entropy.kind={rule.kind!r} reports {dict(reported)}; it must report finite (sum, count) pairs among "
            f"{list(rule.reports)}"
        )


def _rate_limited(alpha: float, proposed: float, max_change: float) -> float:
    """Returns ``proposed`` moved to at most ``max_change`` from ``alpha``; 0 = no limit."""
    if max_change == 0 or abs(proposed - alpha) <= max_change:
        return proposed
    if proposed > alpha:
        return min(alpha + max_change, proposed)  # min and max: rounding must not step over the proposal
    return max(alpha - max_change, proposed)


def _side(entropy: float, target: float) -> str:
    return "below" if entropy < target else "above" if entropy > target else "at"


def _alarm(state: ControllerState, rule: EntropyRule, entropy: float, target: float) -> str | None:
    """Returns the collapse or explosion alarm of this step, or None; a threshold of 0 is off."""
    where = f"at step {state.step}: H {entropy:.4g}, H* {target:.4g}, alpha {state.alpha:.4g}"
    if rule.alarm_low > 0 and entropy < rule.alarm_low * target:
        return f"entropy collapse {where}; H is below {rule.alarm_low:.4g} of the target"
    initial = state.initial_entropy
    if rule.alarm_high > 0 and initial is not None and entropy > rule.alarm_high * initial:
        return f"entropy explosion {where}; H is above {rule.alarm_high:.4g} times the initial {initial:.4g}"
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

"""What is killed, and when: drawn once from a seed, by the step that the run has reached.

A kill is due when the run first reaches its step, whatever was lost and done again before; so all of them fall inside
the run, and a harness that was itself interrupted goes on with the next one.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Victim = Literal["rank", "server", "verifier", "launcher"]
# random: at any time; start: while a launch loads and resumes; the others: when such a thing is seen on disk
Moment = Literal["random", "start", "checkpoint", "transfer"]

SHARES: Mapping[str, Mapping[Victim, float]] = {
    "embedded": {"rank": 0.45, "verifier": 0.35, "launcher": 0.2},
    "sglang": {"rank": 0.25, "server": 0.35, "verifier": 0.25, "launcher": 0.15},
}
_CHECKPOINT, _TRANSFER, _START = 0.25, 0.25, 0.3  # of the kills that can come then
ENDS_LAUNCH: tuple[Victim, ...] = ("rank", "launcher")


@dataclass(frozen=True, slots=True)
class Kill:
    """``delay`` in [0, 1) is the place within a step, a write, a transfer or a start."""

    step: int
    victim: Victim
    moment: Moment
    delay: float
    choice: float  # in [0, 1): which one of several


def draw_kills(count: int, *, num_steps: int, engine: str, seed: int) -> list[Kill]:
    """Returns ``count`` kills in the order in which they are due.

    Raises:
        ValueError: fewer steps than kills.
    """
    last = num_steps * 9 // 10  # what waits for a write after its step must still find one
    if last <= count:
        raise ValueError(f"--steps {num_steps} is too few for --kills {count}; every kill has a step of its own")
    chance = random.Random(seed)
    steps = sorted(chance.sample(range(1, last), count))
    shares = SHARES[engine]
    kills: list[Kill] = []
    for step in steps:
        victim = chance.choices(list(shares), weights=list(shares.values()))[0]
        after_end = bool(kills) and kills[-1].victim in ENDS_LAUNCH
        moment = _moment(victim, chance.random(), engine=engine, after_end=after_end)
        kills.append(Kill(step, victim, moment, chance.random(), chance.random()))
    return kills


def _moment(victim: Victim, draw: float, *, engine: str, after_end: bool) -> Moment:
    if victim in ENDS_LAUNCH and after_end and draw < _START:
        return "start"
    if victim in ENDS_LAUNCH and draw < _START + _CHECKPOINT:
        return "checkpoint"
    if victim != "verifier" and engine == "sglang" and draw > 1.0 - _TRANSFER:
        return "transfer"
    return "random"


def lost_seconds(faults: list[dict[str, Any]], *, step_s: float) -> list[float]:
    """Returns what each fault cost: until the run was beyond its old step, or until the next fault, less one step."""
    lost = []
    for number, fault in enumerate(faults):
        ends = [moment for moment in (fault.get("recovered_s"), *_next(faults, number)) if moment is not None]
        lost.append(max(0.0, min(ends) - fault["wall_s"] - step_s) if ends else 0.0)
    return lost


def _next(faults: list[dict[str, Any]], number: int) -> list[float]:
    return [faults[number + 1]["wall_s"]] if number + 1 < len(faults) else []

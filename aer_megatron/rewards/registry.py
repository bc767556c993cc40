"""Which verifiers exist, and where each may run.

    name                    runs in              judged by
    countdown               the trainer          rewards/countdown.py
    math                    trainer / worker     integers at once, else math-verify in a worker process
    reasoning_gym:NAME      worker               the generator's own scorer
    package.module:function worker               your function (text, prompt) -> Verdict | float | bool

This file does NOT start processes (rewards/pool.py).
"""

from __future__ import annotations

import importlib
import math as arithmetic
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from aer_megatron.rewards import math, reasoning_gym
from aer_megatron.rewards.countdown import verify_countdown
from aer_megatron.types import Prompt, Verdict

VerifyFunction = Callable[[str, Prompt], Any]
_REASONING_GYM = "reasoning_gym:"


@dataclass(frozen=True, slots=True)
class Verifier:
    """How to reach one verifier.

    ``decide`` runs in the caller's process and may leave the case open (None); open cases go to a worker
    process, which calls ``load(timeout_s)`` once and then the function it returns. ``in_process`` verifiers
    leave none open.
    """

    name: str
    in_process: bool
    decide: VerifyFunction
    load: Callable[[float], VerifyFunction]


def find_verifier(name: str) -> Verifier:
    """Returns the verifier called ``name``.

    Raises:
        ValueError: no verifier has that name, or the function it names cannot be imported.
    """
    if name == "countdown":
        return Verifier(name, True, verify_countdown, lambda timeout_s: verify_countdown)
    if name == "math":
        # half the hard limit for each of parsing and comparing: the alarm should come before the kill
        return Verifier(name, False, math.decide_quickly, lambda t: math.MathVerifier(max(1, int(t / 2))))
    if name.startswith(_REASONING_GYM):
        task = name.removeprefix(_REASONING_GYM)
        return Verifier(
            name,
            False,
            reasoning_gym.decide_quickly,
            lambda timeout_s: reasoning_gym.ReasoningGymVerifier(task),
        )
    if ":" in name:
        return Verifier(name, False, lambda text, prompt: None, lambda timeout_s: _import_function(name))
    raise ValueError(
        f"verifier {name!r} is unknown; use 'math', 'countdown', 'reasoning_gym:NAME' or "
        f"'package.module:function'"
    )


def is_built_in(name: str) -> bool:
    """Returns whether ``name`` is a verifier of this project, which a data record may ask for by itself."""
    return name in ("countdown", "math") or re.fullmatch(rf"{_REASONING_GYM}[a-z0-9_]+", name) is not None


def check_verifiers(names: Iterable[str]) -> None:
    """Raises where a verifier of ``names`` cannot be used: a typing error stops a run before its first step.

    Raises:
        ValueError: a name is unknown or its function cannot be imported (with the reason).
    """
    for name in sorted(set(names)):
        if find_verifier(name).in_process or name == "math" or name.startswith(_REASONING_GYM):
            continue
        _import_function(name)


def to_verdict(result: Any) -> Verdict:
    """Returns a verifier's result as a ``Verdict``: 1/True is correct, 0/False wrong, other numbers "scored".

    Raises:
        TypeError: it is neither a Verdict nor a number.
        ValueError: the reward is not finite.
    """
    if isinstance(result, Verdict):
        reward, reason = float(result.reward), str(result.reason)
    elif isinstance(result, bool | int | float) or hasattr(result, "__float__"):
        reward = float(result)
        reason = {1.0: "correct", 0.0: "wrong"}.get(reward, "scored")
    else:
        raise TypeError(f"a verifier must return Verdict, float or bool, not {type(result).__name__}")
    if not arithmetic.isfinite(reward):
        raise ValueError(f"a verifier returned the reward {reward}; it must be finite")
    return Verdict(reward, reason)


def judge(verify: VerifyFunction, text: str, prompt: Prompt) -> Verdict | None:
    """Returns the verdict of ``verify`` (None: the case is left open); any error is a counted verdict."""
    verdict, error = attempt(lambda: _call(verify, text, prompt))
    return verdict if error is None else Verdict(0.0, f"verifier_error:{type(error).__name__}")


def attempt(function: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """Returns (result, None), or (None, error) if ``function`` raises.

    The sandbox edge: the one place of the project that catches every exception, because a verifier may be
    anything.
    """
    try:
        return function(), None
    except Exception as error:
        return None, error


def _call(verify: VerifyFunction, text: str, prompt: Prompt) -> Verdict | None:
    result = verify(text, prompt)
    return None if result is None else to_verdict(result)


def _import_function(name: str) -> VerifyFunction:
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"verifier {name!r} cannot be imported: {error}; it must be 'package.module:function' on the "
            f"Python path"
        ) from None
    if not callable(function):
        raise ValueError(f"verifier {name!r} is not a function; it is called with (text, prompt)")
    return function  # type: ignore[no-any-return]

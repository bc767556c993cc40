"""Which verifiers exist, and where each may run.

    name                    runs in              judged by
    countdown               the trainer          rewards/countdown.py
    math                    trainer / worker     integers at once, else the grammar of answers in a worker process
    math_verify             trainer / worker     the same with the library math-verify in place of the grammar
    reasoning_gym:NAME      worker               the generator's own scorer, unless rewards/refused_scorers.py has it
    package.module:function worker               your function (text, prompt) -> Verdict | float | bool

This file does NOT start processes (rewards/pool.py).
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aer_megatron.rewards import math, reasoning_gym
from aer_megatron.rewards.countdown import verify_countdown
from aer_megatron.rewards.labels import error_label, to_label
from aer_megatron.rewards.math_verify import MathVerifyVerifier
from aer_megatron.rewards.messages import MAX_REWARD
from aer_megatron.rewards.refused_scorers import check_scorer
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

    @property
    def is_checked_in_worker(self) -> bool:
        """Whether only a worker process can tell that it can be used: it imports what the name says."""
        return ":" in self.name


def find_verifier(name: str) -> Verifier:
    """Returns the verifier called ``name``.

    Raises:
        ValueError: no verifier has that name, or it is a scorer that is refused as a reward.
    """
    if name == "countdown":
        return Verifier(name, True, verify_countdown, lambda timeout_s: verify_countdown)
    if name == "math":
        return Verifier(name, False, math.decide_quickly, lambda timeout_s: math.verify_math)
    if name == "math_verify":
        # half the hard limit for each of parsing and comparing: the alarm should come before the kill
        return Verifier(name, False, math.decide_quickly, lambda t: MathVerifyVerifier(max(1, int(t / 2))))
    if name.startswith(_REASONING_GYM):
        task = name.removeprefix(_REASONING_GYM)
        check_scorer(task)
        return Verifier(
            name,
            False,
            reasoning_gym.decide_quickly,
            lambda timeout_s: reasoning_gym.ReasoningGymVerifier(task),
        )
    if ":" in name:
        return Verifier(name, False, lambda text, prompt: None, lambda timeout_s: _import_function(name))
    raise ValueError(
        f"verifier {name!r} is unknown; use 'math', 'math_verify', 'countdown', 'reasoning_gym:NAME' or "
        f"'package.module:function'"
    )


def is_built_in(name: str) -> bool:
    """Returns whether ``name`` is a verifier of this project, which a data record may ask for by itself."""
    if name in ("countdown", "math", "math_verify"):
        return True
    return re.fullmatch(rf"{_REASONING_GYM}[a-z0-9_]+", name) is not None


def load_verifier(name: str, timeout_s: float) -> VerifyFunction:
    """Returns the function of a verifier, ready to judge: what a worker process calls.

    Raises:
        ValueError: no verifier has that name, or what it names is no function of (text, prompt).
    """
    return find_verifier(name).load(timeout_s)


def to_verdict(result: Any) -> Verdict:
    """Returns a verifier's result as a ``Verdict``: 1/True is correct, 0/False wrong, other numbers "scored".

    Raises:
        TypeError: it is neither a Verdict nor a number.
        ValueError: the reward is not finite or beyond 10^6.
    """
    given, reason = (result.reward, result.reason) if isinstance(result, Verdict) else (result, None)
    if isinstance(given, str | bytes) or not hasattr(given, "__float__"):
        raise TypeError(f"a verifier must return Verdict, float or bool, not {_describe(result, given)}")
    reward = float(given)
    if not abs(reward) <= MAX_REWARD:  # also where it is no number
        raise ValueError(f"a verifier returned the reward {reward}; it must be in [-{MAX_REWARD:g}, {MAX_REWARD:g}]")
    if reason is None:
        reason = {1.0: "correct", 0.0: "wrong"}.get(reward, "scored")
    return Verdict(reward, to_label(str(reason)))


def _describe(result: Any, given: Any) -> str:
    return f"a Verdict with a {type(given).__name__}" if isinstance(result, Verdict) else type(result).__name__


def judge(verify: VerifyFunction, text: str, prompt: Prompt) -> Verdict | None:
    """Returns the verdict of ``verify`` (None: the case is left open); any error is a counted verdict."""
    verdict, error = attempt(lambda: _call(verify, text, prompt))
    return verdict if error is None else Verdict(0.0, error_label(error))


def attempt(function: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """Returns (result, None), or (None, error) if ``function`` raises.

    The sandbox edge, with ``attempt_anything``: the one place of the project that catches every exception, because a
    verifier may be anything.
    """
    try:
        return function(), None
    except Exception as error:
        return None, error


def attempt_anything(function: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    """The same in a worker process, where also SystemExit and KeyboardInterrupt are only what a verifier raised."""
    try:
        return function(), None
    except BaseException as error:
        return None, error


def _call(verify: VerifyFunction, text: str, prompt: Prompt) -> Verdict | None:
    result = verify(text, prompt)
    return None if result is None else to_verdict(result)


def _import_function(name: str) -> VerifyFunction:
    module_name, _, function_name = name.partition(":")
    function, error = attempt_anything(lambda: getattr(importlib.import_module(module_name), function_name))
    if error is not None:
        raise ValueError(
            f"verifier {name!r} cannot be imported: {type(error).__name__}: {error}; it must be "
            "'package.module:function' on the Python path"
        ) from error
    _check_function(name, function)
    return function  # type: ignore[no-any-return]


def _check_function(name: str, function: Any) -> None:
    """Raises ValueError unless ``function`` can be called with (text, prompt) and then answers."""
    rule = "it is called with two positional arguments, (text, prompt), and returns a Verdict, a float or a bool"
    if not callable(function) or inspect.isclass(function):
        raise ValueError(f"verifier {name!r} is not a function but a {type(function).__name__}; {rule}")
    bodies = (function, getattr(function, "__call__", None))  # noqa: B004 - a callable object's own code
    if any(inspect.iscoroutinefunction(body) or inspect.isasyncgenfunction(body) for body in bodies):
        raise ValueError(f"verifier {name!r} is an async function; {rule}: use 'def', with asyncio.run() inside")
    if any(inspect.isgeneratorfunction(body) for body in bodies):
        raise ValueError(f"verifier {name!r} is a generator function; {rule}: use 'return' instead of 'yield'")
    signature, _ = attempt(lambda: inspect.signature(function))
    if signature is None:
        return  # some functions written in C do not tell
    _, error = attempt(lambda: signature.bind("text", None))
    if error is not None:
        raise ValueError(f"verifier {name!r} has the arguments {signature} ({error}); {rule}")

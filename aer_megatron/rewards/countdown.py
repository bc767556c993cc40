"""Judges Countdown-style answers with an exact integer parser: no ``eval``, microseconds per answer.

Grammar: ``number (operator number)*`` with ``+ - *``, ``*`` first, spaces allowed, no parentheses, no signs.
"""

from __future__ import annotations

import re

from aer_megatron.types import Prompt, Verdict

_PROBLEM = re.compile(r"([0-9]+(?:,[0-9]+)*)=(-?[0-9]{1,100})>")
_NUMBER = r"(?:0|[1-9][0-9]{0,5})"  # bounded: int() of an endless digit string is slow
_EXPRESSION = re.compile(rf" *{_NUMBER}(?: *[-+*] *{_NUMBER})* *")
_TOKEN = re.compile(rf"{_NUMBER}|[-+*]")
_MAX_LENGTH = 256


def verify_countdown(text: str, prompt: Prompt) -> Verdict:
    """Returns reward 1 for an expression that uses each number of the problem once and gives its target.

    Reasons: ``correct``, ``wrong_value``, ``wrong_numbers``, ``malformed``, ``no_answer``.

    Example: ``verify_countdown("3+5*2-8", Prompt(..., problem="2,3,5,8=5>")) == Verdict(1.0, "correct")``

    Raises:
        ValueError: the problem is not of the form "a,b,c,d=target>".
    """
    problem = _PROBLEM.fullmatch(prompt.problem)
    if problem is None:
        raise ValueError(f"problem {prompt.problem[:60]!r} is not of the form 'a,b,c,d=target>'")
    text = text.strip()
    if not text:
        return Verdict(0.0, "no_answer")
    if len(text) > _MAX_LENGTH or _EXPRESSION.fullmatch(text) is None:
        return Verdict(0.0, "malformed")
    tokens = _TOKEN.findall(text)
    if sorted(tokens[0::2]) != sorted(problem.group(1).split(",")):
        return Verdict(0.0, "wrong_numbers")
    if evaluate(tokens) != int(problem.group(2)):
        return Verdict(0.0, "wrong_value")
    return Verdict(1.0, "correct")


def evaluate(tokens: list[str]) -> int:
    """Returns the value of alternating numbers and operators, ``*`` before ``+`` and ``-``.

    Example: ``evaluate(["3", "+", "5", "*", "2", "-", "8"]) == 5``
    """
    total, term = 0, int(tokens[0])
    for operator, number in zip(tokens[1::2], tokens[2::2], strict=True):
        if operator == "*":
            term *= int(number)
        else:
            total += term
            term = int(number) if operator == "+" else -int(number)
    return total + term

"""Judges mathematical answers: plain integers at once, everything else by the grammar of answers in a worker process.

Only the LAST box counts (``boxed_answer``). What counts as the same answer: rewards/answers/judge.py.
"""

from __future__ import annotations

import re

from aer_megatron.rewards.extract import boxed_answer
from aer_megatron.types import Prompt, Verdict

_INTEGER = re.compile(r"\s*[-+]?(?:[0-9]{1,100}|[0-9]{1,3}(?:(?:,|\{,\}|,\\!|\\,)[0-9]{3}){1,30})\s*")
_NO_DIGIT = re.compile(r"[^-0-9]")


def decide_quickly(text: str, prompt: Prompt) -> Verdict | None:
    """Returns the verdict where none of it needs algebra - no box, or two integers - else None.

    Reasons: ``no_answer``, ``correct``, ``wrong``.
    """
    answer = boxed_answer(text)
    if answer is None or not answer.strip():
        return Verdict(0.0, "no_answer")
    given, gold = parse_integer(answer), parse_integer(prompt.answer)
    if given is None or gold is None:
        return None
    return Verdict(1.0, "correct") if given == gold else Verdict(0.0, "wrong")


def parse_integer(text: str) -> int | None:
    """Returns the integer that ``text`` spells, or None: sign, digits, commas or thin spaces between thousands.

    Example: ``parse_integer("1{,}234") == 1234``
    """
    return int(_NO_DIGIT.sub("", text)) if _INTEGER.fullmatch(text) else None


def verify_math(text: str, prompt: Prompt) -> Verdict:
    """Returns the verdict by the grammar of answers.

    Reasons: ``correct``, ``wrong``, ``no_answer``, ``unparseable`` (the answer is no sentence of the grammar),
    ``bad_gold`` (the gold answer is none, and the answer another text).
    """
    # mpmath takes a tenth of a second to import: only worker processes pay
    from aer_megatron.rewards.answers.judge import can_be_read, matches

    quick = decide_quickly(text, prompt)
    if quick is not None:
        return quick
    answer = boxed_answer(text) or ""
    if matches(prompt.answer, answer):
        return Verdict(1.0, "correct")
    if not can_be_read(prompt.answer):
        return Verdict(0.0, "bad_gold")
    return Verdict(0.0, "wrong" if can_be_read(answer) else "unparseable")

"""Finds the answer inside a completion: the last ``\\boxed{}``, ``<answer>`` tags, or what follows "Answer:".

This file does NOT compare answers.
"""

from __future__ import annotations

import re

_BOX = "\\boxed{"
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_MARKED = re.compile(r"answer\s*:", re.IGNORECASE)


def last_boxed(text: str) -> str | None:
    """Returns the content of the last ``\\boxed{...}`` of ``text``, or None where there is none.

    Braces nest; an escaped brace does not count. A last box that is never closed (a truncated answer) gives
    the rest of the text with an unbalanced brace, which no parser accepts: an earlier box is not the final
    answer.

    Example: ``last_boxed(r"so \\boxed{1}, or rather \\boxed{\\frac{1}{2}}.") == r"\\frac{1}{2}"``
    """
    start = text.rfind(_BOX)
    if start < 0:
        return None
    start += len(_BOX)
    depth, position = 1, start
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 1
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return text[start:position]
        position += 1
    return "{" + text[start:]


def final_answer(text: str) -> str:
    """Returns the answer that ``text`` ends with, "" where there is none.

    In this order: the last ``\\boxed{}``; the last ``<answer>...</answer>``; the rest of the line after the
    last "Answer:" (of the text, if that line is empty); else the whole text. Reasoning up to the last
    ``</think>`` is cut.
    """
    text = text.rsplit("</think>", 1)[-1]
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    tagged = _TAGGED.findall(text)
    if tagged:
        return str(tagged[-1]).strip()
    marks = list(_MARKED.finditer(text))
    if marks:
        rest = text[marks[-1].end() :].strip(" \t*")
        line = rest.split("\n", 1)[0].strip().strip("*").strip()
        return line or rest.strip()
    return text.strip()

"""Finds the answer inside a completion: the last ``\\boxed{}``, ``<answer>`` tags, or what follows "Answer:".

The text is the policy's and may be a megabyte of ``<answer>``: every search here goes over it once, because it runs in
the trainer's own process without a time limit. A pattern with two ends is sought by ``str.find``, not by a regular
expression, which would look for the second end again from every first one.

This file does NOT compare answers.
"""

from __future__ import annotations

import re

_BOX = "\\boxed{"
_ANY_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BARE = re.compile(r"\\[A-Za-z]+|[-+]?[0-9][0-9.,]*|[^\s$]")
_OPEN, _CLOSE = "<answer>", "</answer>"
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
    end = _closing(text, start)
    return text[start:end] if end is not None else "{" + text[start:]


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
    tagged = _last_tagged(text)
    if tagged is not None:
        return tagged.strip()
    end = max((mark.end() for mark in _MARKED.finditer(text)), default=None)
    if end is not None:
        rest = text[end:].strip(" \t*")
        line = rest.split("\n", 1)[0].strip().strip("*").strip()
        return line or rest.strip()
    return text.strip()


def boxed_answer(text: str) -> str | None:
    """Returns the content of the last box behind the reasoning, or None where there is none or it is never closed.

    Reasoning is what stands up to the last ``</think>``; one that was begun and not ended leaves no answer.
    ``\\boxed 7`` is a box as well.

    Example: ``boxed_answer(r"<think>\\boxed{1}</think> so \\boxed{2}") == "2"``
    """
    rest = text.rpartition("</think>")[2]
    if "<think>" in rest:
        return None
    begin = max((match.end() for match in _ANY_BOX.finditer(rest)), default=None)
    if begin is None:
        return None
    if rest[begin : begin + 1] != "{":
        bare = _BARE.match(rest, begin)
        return bare.group().rstrip(".,") if bare else None
    end = _closing(rest, begin + 1)
    return None if end is None else rest[begin + 1 : end]


def _last_tagged(text: str) -> str | None:
    """Returns what stands between the last ``<answer>`` and ``</answer>`` that belong together, None without any."""
    found, position = None, 0
    while True:
        start = text.find(_OPEN, position)
        end = text.find(_CLOSE, start + len(_OPEN)) if start >= 0 else -1
        if end < 0:
            return found
        found, position = text[start + len(_OPEN) : end], end + len(_CLOSE)


def _closing(text: str, start: int) -> int | None:
    """Returns where the brace stands that closes a group whose content begins at ``start``; None without one."""
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
                return position
        position += 1
    return None

"""Answers that are words: a choice of letters, yes and no, names; and whether an answer says the same."""

from __future__ import annotations

import re

from aer_megatron.rewards.answers import grammar
from aer_megatron.rewards.answers.cursor import trimmed
from aer_megatron.rewards.answers.nodes import Words
from aer_megatron.rewards.answers.spelling import Token, spelled
from aer_megatron.rewards.answers.words import VERDICTS

_CHOICE = re.compile(r"\(?([A-Z])\)?")


def spelling(tokens: list[Token]) -> str:
    return spelled(trimmed(tokens))


def by_words(gold: list[Token], answer: list[Token], gold_text: str, answer_text: str) -> bool | None:
    """Returns the verdict where the gold answer is a choice, yes or no, or another text; None where it is none."""
    if gold_text and gold_text == answer_text and _is_text(gold):
        return True
    choice = _choice(gold)
    if choice is not None:
        return (
            _chosen(answer) == choice
            if _chosen(answer)
            else None
            if len(choice) == 1 and _has_numbers(answer)
            else False
        )
    letters = _letters(gold)
    if len(letters) > 1:
        return letters == _letters(answer)
    if gold_text in VERDICTS:
        return _says(answer, gold_text)
    return False if _is_text(gold) else None


def _is_text(tokens: list[Token]) -> bool:
    """Words, or a run of letters that is a word or a name (BA), without any value before it."""
    tokens = trimmed(tokens)
    if len(tokens) > 1 and all(
        token.kind == "name" and len(token.value) == 1 and token.value.isupper() for token in tokens
    ):
        return True
    try:
        node = grammar.parse(tokens)
    except ValueError:
        return bool(tokens) and tokens[0].kind == "word" and not any(token.number is not None for token in tokens[:1])
    return isinstance(node, Words)


def _choice(tokens: list[Token]) -> str | None:
    """Returns the letter of a gold answer that is a choice: (C), \\text{C}, D."""
    match = _CHOICE.fullmatch("".join(token.value for token in trimmed(tokens)))
    return match.group(1) if match else None


def _letters(tokens: list[Token]) -> frozenset[str]:
    """Returns the letters of several choices, "C, E" or "(C) and (E)"; none where it is anything else."""
    values = [token.value for token in trimmed(tokens) if token.value not in ("(", ")")]
    letters, joints = values[0::2], values[1::2]
    if all(len(letter) == 1 and "A" <= letter <= "Z" for letter in letters) and all(
        j in (",", ";", "and") for j in joints
    ):
        return frozenset(letters)
    return frozenset()


def _chosen(tokens: list[Token]) -> str | None:
    """Returns the letter of a choice that may be followed by its text; None where it is none or more than one."""
    tokens = trimmed(tokens)
    while (
        tokens
        and tokens[0].kind == "word"
        and tokens[0].value.casefold() in ("option", "choice", "answer", "the", "is")
    ):
        tokens = tokens[1:]
    values = [token.value for token in tokens]
    opened = bool(values) and values[0] == "("
    values, tokens = values[opened:], tokens[opened:]
    if not values or len(values[0]) != 1 or not values[0].isalpha() or not values[0].isupper():
        return None
    rest, rest_tokens = values[1:], tokens[1:]
    if rest and rest[0] in (")", ".", ":"):
        rest, rest_tokens = rest[1:], rest_tokens[1:]
    elif opened or (rest and not (rest_tokens[0].space and rest_tokens[0].kind == "word")):
        return None
    another = any(
        len(token.value) == 1 and token.value.isupper() and token.kind in ("name", "word") and "A" <= token.value <= "E"
        for token in rest_tokens
    )
    if another or (rest and rest[0].casefold() in ("or", "and", ",", "=", "/")):
        return None
    return values[0]


def _has_numbers(tokens: list[Token]) -> bool:
    return any(token.number is not None for token in tokens)


def _says(tokens: list[Token], verdict: str) -> bool:
    """Whether a text begins with yes (no, true, false) and goes on, if at all, without taking it back."""
    tokens = trimmed(tokens)
    words = [token.value.casefold() for token in tokens]
    if not words or words[0] != verdict:
        return False
    if len(words) == 1:
        return True
    if words[1] not in (",", ".", ";", ":", "-", "because", "since", "as", "!"):
        return False
    return not any(word in ("or", VERDICTS[verdict], "maybe", "perhaps", "but") for word in words[1:])

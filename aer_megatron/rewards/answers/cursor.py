"""A place in the tokens of an answer, and a bound on what a hostile answer can nest."""

from __future__ import annotations

from collections.abc import Callable

from aer_megatron.rewards.answers.nodes import Node
from aer_megatron.rewards.answers.spelling import Token

_MAX_DEPTH = 40


def trimmed(tokens: list[Token]) -> list[Token]:
    """Cuts punctuation at the ends, a leading = and approximately-equal, and braces around everything."""
    start, end = 0, len(tokens)
    while end > start and (
        tokens[end - 1].value in (".", ",", ";", ":", "newrow", "`") and tokens[end - 1].number is None
    ):
        end -= 1
    while start < end and tokens[start].value in ("=", "approx", ",", ";", ":", "newrow", "`"):
        start += 1
    return tokens[start:end]


class Cursor:
    """Walks over tokens from left to right; the grammar's rules are methods of its subclasses."""

    def __init__(self, tokens: list[Token]) -> None:
        self.tokens = tokens
        self.at = 0
        self._depth = 0

    def peek(self, ahead: int = 0) -> Token | None:
        """Returns the token ``ahead`` of the next one, None beyond the end."""
        index = self.at + ahead
        return self.tokens[index] if index < len(self.tokens) else None

    def at_mark(self, *values: str, ahead: int = 0) -> bool:
        """Returns whether that token is a sign or a command of one of these values."""
        token = self.peek(ahead)
        return (
            token is not None and token.number is None and token.kind in ("mark", "command") and token.value in values
        )

    def take(self) -> Token:
        """Returns the next token and passes over it. Raises ValueError at the end."""
        token = self.peek()
        if token is None:
            raise ValueError("the answer ends too early")
        self.at += 1
        return token

    def skip(self, value: str) -> None:
        """Passes over ``value``. Raises ValueError where it is not next."""
        if not self.at_mark(value):
            raise ValueError(f"{value!r} is missing")
        self.at += 1

    def expect_end(self) -> None:
        """Raises ValueError where tokens are left over."""
        token = self.peek()
        if token is not None:
            raise ValueError(f"{token.value!r} has no place here")

    def deeper(self, rule: Callable[[], Node]) -> Node:
        """Returns what ``rule`` reads, one level further down. Raises ValueError beyond the bound."""
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise ValueError("nested too deeply")
        node = rule()
        self._depth -= 1
        return node

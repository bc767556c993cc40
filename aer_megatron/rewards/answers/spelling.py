"""Reads the text of an answer - LaTeX, Unicode, words - into tokens of one alphabet.

    "2\\,\\text{cm}"  ->  number 2, word "cm"          "½"  ->  command frac, {, number 1, }, {, number 2, }

Spacing and styling leave no token; ``Token.space`` says that there was a gap before one. Every function takes time
linear in the length of its text. This file does NOT know what tokens mean together (grammar.py).
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from aer_megatron.rewards.answers.alphabet import (
    ALIASES,
    ALPHABETS,
    SCRIPTS,
    SINGLE,
    SPACES,
    STYLES,
    TABLE,
    TEXTS,
    WRAPPERS,
)
from aer_megatron.rewards.answers.words import FUNCTIONS, UNITS

MAX_LENGTH = 4000  # characters of an answer; longer ones are compared as texts only

Kind = Literal["number", "name", "word", "command", "mark"]


@dataclass(frozen=True, slots=True)
class Token:
    """``value`` is the spelling; ``number`` the value of a number.

    Example: ``Token("number", "1.50", Fraction(3, 2))``
    """

    kind: Kind
    value: str
    number: Fraction | None = None
    space: bool = False


# digits in groups of three, each group cut off in the same way: 1,234  1{,}234  1,\!234  1\,234  1 234
_GROUPED = re.compile(
    r"[0-9]{1,3}(?:(?:\{,\}|,\\! ?)[0-9]{3}|,[0-9]{3}(?![0-9])){1,40}(?:\.[0-9]+)?(?![0-9])"
    r"|[0-9]{1,3}(?:(?:\\,|\{\\,\}|\\ )[0-9]{3}){1,40}(?:\.[0-9]+)?(?![0-9])"
    r"|[0-9]{1,3}(?: [0-9]{3}){1,40}(?:\.[0-9]+)?(?![0-9.])"
)
_PLAIN = re.compile(r"[0-9]+(?:\.(?:[0-9]+|(?=\\(?:overline|dot|bar)))|)(?:[eE][-+]?[0-9]{1,3}(?![\w.]))?|\.[0-9]+")
_COMMAND = re.compile(r"\\([A-Za-z]+|.)", re.DOTALL)
_LETTERS = re.compile(r"[^\W\d_]+")
_WORD = re.compile(r"[AaPp]\.\s?[Mm]\.?(?!\w)|[^\W\d_]+(?:['-][^\W\d_]+)*")
_MODULO = re.compile(r"\((\\bmod [^()]*)\)")  # p = 1 (mod 4) with and without the brackets
_BLANKS = re.compile(r"\s+")


def tokens_of(text: str, *, grouped: bool = True, words: bool = True) -> list[Token]:
    """Returns the tokens of an answer.

    ``grouped`` reads ``1,234`` as one number, else as two; ``words`` lets letters outside of \\text be words.

    Raises:
        ValueError: braces of a command's argument do not close.
    """
    return _Scanner(_one_alphabet(text), grouped, words).run()


def has_groups(text: str) -> bool:
    """Returns whether commas without blanks could be read as cutting a list or as grouping digits."""
    return re.search(r"[0-9],[0-9]{3}(?![0-9])", text) is not None


def spelled(tokens: list[Token]) -> str:
    """Returns one text for all spellings of the same tokens; words without case, numbers by value."""
    parts = []
    for index, token in enumerate(tokens):
        if token.number is not None:
            before = tokens[index - 1] if index else None
            glue = " " if before is not None and before.number is not None else ""
            parts.append(f"{glue}{token.number}")
        elif token.kind == "word":
            parts.append(token.value.casefold() if len(token.value) > 1 else token.value)
        elif token.value == "," and index + 1 < len(tokens) and tokens[index + 1].value == "&":
            continue  # of a definition by cases
        elif token.kind == "command":
            parts.append(f"\\{token.value} ")
        else:
            parts.append(token.value)
    return _MODULO.sub(r"\1", "".join(parts))


def _one_alphabet(text: str) -> str:
    for mark, table in SCRIPTS:
        signs = "".join(table)
        text = re.sub(f"[{signs}]+", lambda run, m=mark, t=table: f"{m}{{{''.join(t[c] for c in run.group())}}}", text)  # type: ignore[misc]
    return unicodedata.normalize("NFKC", text.translate(TABLE)).replace("{:}", ":")


class _Scanner:
    """One pass over the text, from left to right."""

    def __init__(self, text: str, grouped: bool, words: bool) -> None:
        self._text = text
        self._options = (grouped, words)
        self._tokens: list[Token] = []
        self._space = False

    def run(self) -> list[Token]:
        position = 0
        while position < len(self._text):
            position = self._step(position)
        return self._tokens

    def _add(self, kind: Kind, value: str, number: Fraction | None = None) -> None:
        self._tokens.append(Token(kind, value, number, self._space))
        self._space = False

    def _step(self, position: int) -> int:
        text = self._text
        character = text[position]
        if character == "\\":
            return self._command(position)
        blanks = _BLANKS.match(text, position)
        if blanks or character == "~":
            self._space = True
            return blanks.end() if blanks else position + 1
        if character.isdigit() or (character == "." and text[position + 1 : position + 2].isdigit()):
            return self._number(position)
        word = _LETTERS.match(text, position)
        if word:
            self._letters(word.group())
            return word.end()
        if character == "$":
            return position + 1
        if character == "%":
            self._add("command", "percent")
        elif character == "*":
            while text[position : position + 1] == "*":  # emphasis of Markdown, or a product
                position += 1
            if self._tokens and position < len(text):
                self._add("command", "cdot")
            return position
        else:
            self._add("mark", character)
        return position + 1

    def _number(self, position: int) -> int:
        match = _GROUPED.match(self._text, position) if self._options[0] else None
        match = match or _PLAIN.match(self._text, position)
        if match is None:  # a digit of another script
            self._add("mark", self._text[position])
            return position + 1
        mantissa, _, exponent = match.group().lower().partition("e")
        digits = re.sub(r"[^0-9.]", "", mantissa)
        whole, _, decimals = digits.partition(".")
        # int() of a long digit string is quadratic and refused beyond 4,300 digits: MAX_LENGTH keeps below
        self._add(
            "number",
            digits,
            Fraction(int((whole + decimals) or "0"), 10 ** len(decimals)) * Fraction(10) ** int(exponent or 0),
        )
        return match.end()

    def _letters(self, run: str) -> None:
        """A run of letters outside of \\text: a function's name, a unit, a word, or variables one after the other."""
        before = self._tokens[-1] if self._tokens else None
        after_value = before is not None and (before.number is not None or before.value in ("}", ")", "percent"))
        if run in FUNCTIONS:
            self._add("command", run)
        elif len(run) > 1 and ((self._options[1] and is_word(run)) or (after_value and run in UNITS)):
            self._add("word", run)
        else:
            for letter in run:
                self._add("name" if letter.isalpha() else "mark", letter)

    def _command(self, position: int) -> int:
        match = _COMMAND.match(self._text, position)
        if match is None:  # a backslash at the end
            return len(self._text)
        name, end = match.group(1), match.end()
        if name in TEXTS or name in WRAPPERS or name in ALPHABETS or name in ("operatorname", "hspace", "vspace"):
            if name == "operatorname" and self._text[end : end + 1] == "*":
                end += 1
            content, end = self._argument(end)
            self._wrapped(name, content)
        elif name == "\\":
            self._add("command", "newrow")
            if self._text[end : end + 1] == "[":  # \\[2mm]
                close = self._text.find("]", end, end + 12)
                end = close + 1 if close > 0 else end
        elif name in ("mod", "bmod") and self._text[end : end + 1] == "{":
            content, end = self._argument(end)
            self._add("command", "bmod")
            self._inline(content)
        elif name in SPACES:
            self._space = True
        elif name in ("begin", "end"):
            content, end = self._argument(end)
            self._add("command", f"{name}:{content.strip().rstrip('*')}")
            if name == "begin" and content.strip() == "array":
                _, end = self._argument(end)
        elif name in ("pmod", "pod"):
            content, end = self._argument(end)
            for token in (*tokens_of("(", grouped=False), Token("command", "bmod")):
                self._tokens.append(token)
            self._tokens.extend(_Scanner(content, *self._options).run())
            self._add("mark", ")")
        elif name in STYLES:
            if name in ("left", "right") and self._text[end : end + 1] == ".":
                end += 1
        else:
            self._named(name)
        return end

    def _named(self, name: str) -> None:
        name = SINGLE.get(name, ALIASES.get(name, name))
        if name == "number" or name == "ampersand":
            return
        if len(name) == 1:
            self._add("name" if name.isalpha() else "mark", name)
        else:
            self._add("command", name)

    def _argument(self, position: int) -> tuple[str, int]:
        """Returns (the text of a command's argument, the position behind it): a group, or one character."""
        text = self._text
        while text[position : position + 1] == " ":
            position += 1
        if text[position : position + 1] != "{":
            return text[position : position + 1], position + 1
        depth, start = 0, position + 1
        while position < len(text):
            character = text[position]
            position += 1
            if character == "\\":
                position += 1
            elif character == "{":
                depth += 1
            elif character == "}":
                depth -= 1
                if depth == 0:
                    return text[start : position - 1], position
        raise ValueError("a brace is not closed")

    def _wrapped(self, name: str, content: str) -> None:
        if name in ("hspace", "vspace", "phantom"):
            self._space = True
        elif name in ALPHABETS:
            self._add("name", ALPHABETS[name] + content.strip())
        elif name == "operatorname":
            inner = content.strip()
            self._add("command", ALIASES.get(inner, inner)) if inner.isalpha() else self._inline(content)
        elif name in TEXTS:
            self._words(content)
        elif content.strip().isalpha() and len(content.strip()) > 1 and content.strip() not in FUNCTIONS:
            self._space = self._space or content[:1] == " "
            self._add("word", content.strip())
        else:
            self._inline(content)

    def _word(self, word: str) -> None:
        if word in ("mod", "modulo"):
            self._add("command", "bmod")
        else:
            self._add("word", re.sub(r"[.\s]", "", word))

    def _inline(self, content: str) -> None:
        inner = _Scanner(content, *self._options)
        inner._space = self._space
        self._tokens.extend(inner.run())
        self._space = inner._space

    def _words(self, content: str) -> None:
        """The content of \\text{}: words, and between them numbers and signs as anywhere."""
        if not any(character.isalpha() for character in content.replace("\\", "")) or "\\" in content or "$" in content:
            self._inline(content)
            return
        position = 0
        while position < len(content):
            word = _WORD.match(content, position)
            if word:
                self._word(word.group())
                position = word.end()
                continue
            end = position + 1
            while end < len(content) and not content[end].isalpha():
                end += 1
            self._inline(content[position:end])
            position = end


def is_word(run: str) -> bool:
    """Returns whether letters one after the other are a word or a name and not a product of variables.

    Four letters or more, three with a vowel among the small ones (``odd``; not ``xyz``), or capitals (``BAC``).
    """
    if len(run) >= 4 or not run.isascii():
        return True
    if len(run) == 3:
        consecutive = all(ord(b) - ord(a) == 1 for a, b in itertools.pairwise(run))
        return run.isupper() or (not consecutive and any(letter in "aeiouy" for letter in run))
    return run in ("or", "is", "no", "No", "NO", "up", "at", "in", "to", "of", "it", "if", "an", "by", "on", "am", "pm")

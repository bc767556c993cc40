"""When two problem texts are the same problem: two normal forms, one of characters and one of words."""

from __future__ import annotations

import re
import unicodedata

_SPACING = re.compile(r"\\(?:left|right|displaystyle|qquad|quad|[,;:! ])|\\?[\s$]|[.,]$")
_WORD = re.compile(r"[^\W_]+")


def essence(text: str) -> str:
    """Returns a text without blanks, dollar signs, TeX's spacing and capitals: equal where only these differ.

    Example: ``essence("What is $x$ ?") == essence("what is \\\\quad x?")``
    """
    return re.sub(r"\s", "", _SPACING.sub("", unicodedata.normalize("NFKC", text))).lower()


def words(text: str) -> list[str]:
    """Returns the words and numbers of a text, in order and in small letters; signs and TeX's braces are none.

    Example: ``words(r"Find $\\frac{1}{2}x$.") == ["find", "frac", "1", "2", "x"]``
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())

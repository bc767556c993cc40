"""Text that a policy, a file or a server wrote, made harmless for a terminal."""

from __future__ import annotations


def visible(text: str, *, keep: str = "\n\t") -> str:
    r"""Returns ``text`` with every character that does something rather than be seen written as its escape.

    Control characters and terminal sequences, bidirectional controls, characters without a width, line separators, and
    surrogates do nothing any more: ``visible("\x1b[2J\u202e") == r"\x1b[2J\u202e"``. Those in ``keep`` stay; for one
    line, keep none.
    """
    return "".join(mark if mark.isprintable() or mark in keep else repr(mark)[1:-1] for mark in text)

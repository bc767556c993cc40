"""Text of others on a terminal: what does something is seen as its escape."""

from __future__ import annotations

import sys

import pytest

from aer_megatron.console.escaping import visible

BIDI = [*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("\x1b]8;;http://x\x1b\\link", "\\x1b]8;;http://x\\x1b\\link"),
        ("\x9b2J", r"\x9b2J"),  # a one-byte terminal sequence
        ("right\rwrong\b\x07\x00\x7f", r"right\rwrong\x08\x07\x00\x7f"),
        ("a\u200bb\ufeffc\U000e0041", r"a\u200bb\ufeffc\U000e0041"),
        ("one\u2028two\x0b\x0c", r"one\u2028two\x0b\x0c"),
        ("\ud800", r"\ud800"),
        ("[bold red]no markup[/] :smile:", "[bold red]no markup[/] :smile:"),
        ("\\boxed{½}\n\tпривет 你好 שלום 🙂", "\\boxed{½}\n\tпривет 你好 שלום 🙂"),
    ],
)
def test_what_is_shown(text: str, shown: str) -> None:
    assert visible(text) == shown


@pytest.mark.parametrize("number", BIDI)
def test_bidirectional_controls_are_seen(number: int) -> None:
    assert visible(f"a{chr(number)}b") == f"a\\u{number:04x}b"


def test_a_line_stays_a_line() -> None:
    assert visible("a\n\tb", keep="") == r"a\n\tb"


def test_nothing_that_acts_is_left_of_all_characters() -> None:
    shown = visible("".join(map(chr, range(sys.maxunicode + 1))))
    assert {mark for mark in shown if not mark.isprintable()} == {"\n", "\t"}

"""Damaged inputs out of valid ones, from a seeded generator: bytes, JSON and TOML values, text.

A mutation is small (one to three changes), so that most of the input stays valid and the change gets past the first
checks of a reader.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

_DEEP = 3000
_LONGEST_ANSWER = 1_000_000  # characters; a generation has fewer
_INTERESTING_BYTES = (
    b"\0", b"\xff", b"\xfe\xff", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b"\r\n", b"\x80", b"\x1b[2J", b"{",
)  # fmt: skip
_WORDS = (
    "", " ", "a", "1", "-1", "true", "null", "nan", "inf", "../../x", "/", "~", "a\0b", "\ud800", "\u202e", "\x1b[31m",
)  # fmt: skip


class Raw(str):
    """JSON text that is written as it is."""


def odd_values(chance: random.Random) -> Any:
    """Returns a value that a reader may not expect."""
    makers: Sequence[Callable[[], Any]] = (
        lambda: None,
        lambda: chance.choice((True, False)),
        lambda: chance.choice((0, -1, 1, 2**31, 2**63, 2**64, -(2**63) - 1, 10**30)),
        lambda: chance.choice((0.0, -0.0, 0.5, -1.5, 1e308, 1e39, 5e-324, float("nan"), float("inf"), float("-inf"))),
        lambda: chance.choice(_WORDS),
        lambda: chance.choice(_WORDS) * chance.choice((1, 100, 20_000)),
        list,
        dict,
        lambda: [odd_values(chance) for _ in range(3)],
        lambda: {chance.choice(_WORDS): odd_values(chance)},
        lambda: Raw("1" + "0" * chance.choice((400, 5000))),
        lambda: Raw("1e" + "9" * chance.choice((3, 20))),
        lambda: Raw(chance.choice(("[", '{"a":')) * _DEEP),
        lambda: Raw("[" * _DEEP + "]" * _DEEP),
        lambda: list(range(chance.choice((10, 5000)))),
    )
    return chance.choice(makers)()


def mutate_tree(value: Any, chance: random.Random) -> Any:
    """Returns a copy of a JSON value with one to three changes."""
    root = [copy.deepcopy(value)]
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        _change(root, chance)
    return root[0]


def _change(root: list[Any], chance: random.Random) -> None:
    holders = list(_holders(root))
    holder, key = chance.choice(holders)
    kind = chance.randrange(8)
    if kind < 4:
        holder[key] = odd_values(chance)
    elif kind == 4 and isinstance(holder, dict):
        del holder[key]
    elif kind == 5 and isinstance(holder, dict):
        holder[chance.choice(_WORDS) + str(key)] = holder[key]  # an unknown key
    elif kind == 6:
        other, place = chance.choice(holders)
        holder[key] = copy.deepcopy(other[place]) if other is not root else holder[key]
    elif isinstance(holder, list) and holder is not root and chance.random() < 0.5:
        holder.insert(key, holder[key])
    else:
        holder[key] = _near(holder[key], chance)


def _near(value: Any, chance: random.Random) -> Any:
    """Returns something close to ``value``: of another type, or off by a little."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int):
        return chance.choice((value + 1, value - 1, -value, float(value), str(value), value * 10**6, bool(value)))
    if isinstance(value, float):
        return chance.choice((-value, value * 1e300, str(value), int(value) if abs(value) < 1e9 else 0))
    if isinstance(value, str):
        return chance.choice((value[:-1], value + " ", value.upper(), value + "\0", [value], value * 2))
    return [value]


def _holders(root: list[Any]) -> Any:
    """Yields every (container, key) below ``root``."""
    waiting: list[Any] = [root]
    while waiting:
        holder = waiting.pop()
        if isinstance(holder, Raw):
            continue
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        for key in keys:
            yield holder, key
            if isinstance(holder[key], (dict, list)):
                waiting.append(holder[key])


def json_text(value: Any, chance: random.Random) -> str:
    """Returns JSON text, now and then with a key written twice; ``Raw`` parts go in as they are."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        pairs = [f"{json.dumps(str(key))}: {json_text(item, chance)}" for key, item in value.items()]
        if pairs and chance.random() < 0.01:
            key = chance.choice(list(value))
            pairs.append(f"{json.dumps(str(key))}: {json_text(odd_values(chance), chance)}")
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(json_text(item, chance) for item in value) + "]"
    return json.dumps(value)


def toml_text(value: Any) -> str:
    """Returns a TOML value; what TOML cannot say (null) becomes an empty string."""
    if isinstance(value, Raw):
        return str(value)
    if value is None:
        return '""'
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml_key(key)} = {toml_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(toml_text(item) for item in value) + "]"
    if isinstance(value, float) and value != value:
        return "nan"
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return "inf" if value > 0 else "-inf"
    return json.dumps(value).replace("\x7f", "\\u007f")


def toml_key(key: str) -> str:
    """Returns a key as TOML writes it."""
    return key if key and key.replace("_", "a").replace("-", "a").isalnum() and key.isascii() else json.dumps(key)


def mutate_bytes(data: bytes, chance: random.Random) -> bytes:
    """Returns damaged bytes: flipped, cut, doubled, inserted, overwritten."""
    result = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        place = chance.randrange(len(result) + 1)
        length = min(len(result) - place, chance.choice((1, 1, 2, 4, 8, 64, 1000)))
        kind = chance.randrange(7)
        if kind <= 1 and place < len(result):
            result[place] ^= 1 << chance.randrange(8)
        elif kind == 2:
            del result[place:]
        elif kind == 3:
            del result[place : place + length]
        elif kind == 4:
            result[place:place] = result[place : place + length] * chance.choice((1, 2, 50))
        elif kind == 5:
            result[place:place] = chance.choice(_INTERESTING_BYTES)
        else:
            result[place : place + length] = chance.randbytes(length)
    return bytes(result)


def mutate_json(data: bytes, chance: random.Random) -> bytes:
    """Returns damaged JSON: mostly another value at some place, sometimes damaged bytes."""
    if chance.random() < 0.25:
        return mutate_bytes(data, chance)
    return json_text(mutate_tree(json.loads(data), chance), chance).encode("utf-8", "surrogatepass")


def mutate_jsonl(data: bytes, chance: random.Random) -> bytes:
    """Returns damaged JSON lines: one of them changed, doubled or lost, sometimes other line ends."""
    if chance.random() < 0.2:
        return mutate_bytes(data, chance)
    lines = data.splitlines()
    place = chance.randrange(len(lines))
    lines[place] = mutate_json(lines[place], chance).replace(b"\n", b" ")
    if chance.random() < 0.1:
        lines.insert(place, chance.choice(lines))
    return chance.choice((b"\n", b"\n", b"\n", b"\r\n", b"\n\n")).join(lines) + chance.choice((b"\n", b""))


def mutate_answer(data: bytes, chance: random.Random) -> bytes:
    """Returns a completion made of what answers are made of, in odd order and number; now and then very long."""
    if chance.random() < 0.2:
        return mutate_bytes(data, chance)
    pieces = [chance.choice(_ANSWER_PIECES) for _ in range(chance.randrange(1, 12))]
    if chance.random() < 0.05:
        place = chance.randrange(len(pieces))
        pieces[place] = pieces[place] * chance.choice((1000, 30_000))
    if chance.random() < 0.5:
        pieces.insert(chance.randrange(len(pieces)), data.decode("utf-8", "replace"))
    text = "".join(pieces)[:_LONGEST_ANSWER]
    return (text if chance.random() < 0.5 else f"\\boxed{{{text}}}").encode("utf-8", "surrogatepass")


_ANSWER_PIECES = (
    "\\boxed{", "}", "{", "\\", "\\{", "<answer>", "</answer>", "<think>", "</think>", "Answer:", "answer :", "ANSWER",
    "\n", " ", "\t", "\0", "1", "24", "-7", "+", "-", "*", "/", "(", ")", ",", "1,234", "1{,}234", "\\,", "$", "%",
    "9" * 50, "9" * 5000, "\u0664", "\uff11", "\u00b2", "1e5", "1e999999999", "\\frac{1}{2}", "\\sqrt{", "3+5*2-8",
    "__import__('os')", "**", "9**9**9", "factorial(10**9)", "\ud800", "\u202e", "=", ">", "x", "\u221e", "nan", "inf",
    "2,3,5,8", "0x1f", "i", "^", "_", "!", "\\binom{9}{4}", "\\log_{2}", "\\pm", "\\infty", "\\begin{pmatrix}",
    "\\\\", "&", "\\end{pmatrix}", "\\text{", "\\le", "\\cup", "[", "]", "\\left(", "\\pi", ";", "and", "^{99999}", "|",
    "\\overline{3}", "'",
)  # fmt: skip

"""JSON from outside, read so that whatever is wrong with it is a ValueError that says so.

Python's own parser raises four types of exception, one of them for 4,300 digits in a row, and takes a file of any size.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from aer_megatron.files.bounded import read_bounded

_MAX_FILE_BYTES = 1 << 28
_MAX_DIGITS = 4300  # what int() takes


class _LongInteger(NamedTuple):
    num_digits: int


def parse_json(text: str | bytes) -> Any:
    """Returns the value in ``text``; bytes are UTF-8, with or without a byte-order mark.

    Raises:
        ValueError: what is wrong with it, and where; the caller puts the file's name in front.
    """
    try:
        return json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except UnicodeDecodeError as error:
        raise ValueError(f"not valid UTF-8 at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column" if error.lineno > 1 else "column"
        raise ValueError(f"not valid JSON: {error.msg} at {where} {error.colno}") from None
    except RecursionError:
        raise ValueError("not usable JSON: nested too deeply") from None
    except ValueError:
        raise ValueError(f"not usable JSON: {_find_long_integer(text)}; write it as text") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """Returns the object that the file ``path`` holds.

    Raises:
        ValueError: the file is missing, not to be read, too large, cut, or holds something else; it is named.
    """
    raw = read_bounded(path, _MAX_FILE_BYTES, what="what it should be", remedy="restore it")
    try:
        value = parse_json(raw)
    except ValueError as error:
        what = "is empty" if not raw.strip() else f"is {error}"
        raise ValueError(f"{path} {what}; copy, download or write it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold one JSON object, found {kind_of(value)}; restore it")
    return value


def kind_of(value: Any) -> str:
    """Returns what a reader of JSON would call ``value``: "an object", "a list", "true/false"."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true/false", int: "an integer", float: "a number"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def _find_long_integer(text: str | bytes) -> str:
    """Returns the place and the length of the first integer that int() refuses."""

    def parse(digits: str) -> Any:
        return _LongInteger(len(digits)) if len(digits) > _MAX_DIGITS else 0

    try:
        whole = json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text, parse_int=parse)
    except (ValueError, RecursionError):  # it was refused before what is wrong behind the integer was reached
        return f"it holds an integer of more than {_MAX_DIGITS} digits"
    waiting = [("", whole)]
    while waiting:
        where, value = waiting.pop()
        if isinstance(value, _LongInteger):
            return f"{where or 'the value'} is an integer of {value.num_digits} digits (at most {_MAX_DIGITS})"
        if isinstance(value, dict):
            waiting += [(f"{where}.{key}" if where else json.dumps(key), item) for key, item in value.items()]
        elif isinstance(value, list):
            waiting += [(f"{where}[{index}]", item) for index, item in enumerate(value)]
    return "it holds an integer that is too long"

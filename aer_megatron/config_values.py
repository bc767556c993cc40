"""Values of the run file before any option takes them: what none takes, and how an error shows one."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from typing import Any

MAX_DEPTH = 32  # of tables and lists in one another
MAX_INTEGER = 2**63  # TOML's integers have 64 bits
MAX_SHOWN = 120  # characters of a value in a message


def check_value(value: Any, where: str, *, depth: int) -> None:
    """Raises ValueError for what no option takes, also inside tables that are passed on as they are."""
    if depth > MAX_DEPTH:
        raise ValueError(f"option {where[:MAX_SHOWN]} is nested more than {MAX_DEPTH} deep; write it flat")
    problem = ""
    if isinstance(value, Mapping):
        for key, item in value.items():
            check_value(key, where or "a key", depth=depth + 1)
            check_value(item, f"{where}.{key}" if where else key, depth=depth + 1)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            check_value(item, f"{where}[{index}]", depth=depth + 1)
    elif isinstance(value, str):
        if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
            problem = "must be UTF-8 text without a NUL character; write it anew"
    elif isinstance(value, int):
        if not -MAX_INTEGER <= value < MAX_INTEGER:
            problem = "is beyond 64 bits; use a number from -2^63 to 2^63 - 1"
    elif isinstance(value, float):
        if not math.isfinite(value):
            problem = "must be a finite number; write one"
    elif isinstance(value, datetime.date | datetime.time):
        problem = "is a date or time, which no option takes; put it in quotes for text"
    if problem:
        raise ValueError(f"option {where}={shown(value)} is not valid: it {problem}")


def shown(value: Any) -> str:
    """Returns a value as a run file spells it, cut where it is long."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and abs(value) >= MAX_INTEGER:
        return f"an integer of {value.bit_length()} bits"  # repr refuses 4,300 digits
    try:
        text = repr(value)
    except ValueError:
        text = f"a {type(value).__name__}"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}... ({len(text)} characters)"

"""A section of the run file: a frozen, strict table whose bad input is an error that names option, value and remedy.

This file does NOT hold options (config.py, algo/options.py) or read files (config_loading.py).
"""

from __future__ import annotations

import datetime
import difflib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

MAX_DEPTH = 32  # of tables and lists in one another
MAX_INTEGER = 2**63  # TOML's integers have 64 bits
_MAX_SHOWN = 120
# what a value of another type is told; pydantic's own words for everything else
_RULES = {
    "int_type": "must be an integer: no text, no fraction, not true or false",
    "float_type": "must be a number: no text, not true or false",
    "bool_type": "must be true or false",
    "string_type": "must be a string; put it in quotes",
    "tuple_type": "must be a list, such as [1, 8]",
    "dict_type": "must be a table",
}


class Section(BaseModel):
    """A frozen table of the run file.

    Strict: a number is a number and never text, true or false; only an integer may stand where a float belongs. A list
    of the file becomes a tuple where the field says ``strict=False``, its elements stay strict.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> Self:
        """Returns the validated section of a nested mapping.

        Raises:
            ValueError: a key is unknown (the nearest one is named) or a value is of the wrong type or out of its range;
                the message starts with the dotted option.
        """
        _reject_unknown(table, cls, cls, prefix="")
        _check_value(table, "", depth=0)
        try:
            return cls.model_validate(dict(table))
        except ValidationError as error:
            raise ValueError("\n".join(_explain(item, cls) for item in error.errors())) from None

    def with_options(self, changes: Mapping[str, Any]) -> Self:
        """Returns the section with options changed, validated as a whole; errors as in ``from_table``.

        Args:
            changes: by dotted name, ``{"parallel.tp": 2, "data.eval": None}``; a table replaces a whole table.
        """
        return self.from_table(merged(self.model_dump(exclude_unset=True), changes))


def merged(table: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a nested mapping with ``changes``, by dotted name, in place of what it says; neither argument changes.

    Raises:
        ValueError: a name goes through a value that is no table, or has an empty part or too many.
    """
    result = dict(table)
    for name, value in changes.items():
        *parents, leaf = parts = name.split(".")
        if not all(part.strip() for part in parts):
            raise ValueError(f"option {shown(name)} must look like section.key=value, without empty parts")
        if len(parts) > MAX_DEPTH:
            raise ValueError(f"option {shown(name)} has {len(parts)} parts; options have at most {MAX_DEPTH}")
        node = result
        for parent in parents:
            below = node.get(parent)
            if below is not None and not isinstance(below, Mapping):
                raise ValueError(
                    f"option {shown(name)}: {parent} is a value, not a table; drop the part after it, or the value"
                )
            node[parent] = dict(below or {})
            node = node[parent]
        node[leaf] = value
    return result


def describe(
    section: type[BaseModel], prefix: str = "", given: BaseModel | None = None
) -> Iterator[tuple[str, str, str, str]]:
    """Yields (dotted key, type, default, description) of every option, in file order.

    ``given`` holds the defaults where the parent sets its own.
    """
    for name, info in section.model_fields.items():
        value = getattr(given, name) if given is not None else info.get_default(call_default_factory=True)
        nested = nested_section(info.annotation)
        if nested is not None:
            yield from describe(nested, f"{prefix}{name}.", value if isinstance(value, BaseModel) else None)
            continue
        default = "required" if given is None and info.is_required() else json.dumps(value, default=str)
        kind = str(info.annotation).replace("typing.", "")
        kind = info.annotation.__name__ if isinstance(info.annotation, type) and "[" not in kind else kind
        yield f"{prefix}{name}", kind, default, info.description or ""


def nested_section(annotation: Any) -> type[BaseModel] | None:
    """Returns the section that a field of this type holds; None for an option."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _check_value(value: Any, where: str, *, depth: int) -> None:
    """Raises ValueError for what no option takes, also inside tables that are passed on as they are."""
    if depth > MAX_DEPTH:
        raise ValueError(f"option {where[:_MAX_SHOWN]} is nested more than {MAX_DEPTH} deep; write it flat")
    problem = ""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_value(key, where or "a key", depth=depth + 1)
            _check_value(item, f"{where}.{key}" if where else key, depth=depth + 1)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_value(item, f"{where}[{index}]", depth=depth + 1)
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


def _reject_unknown(table: Mapping[str, Any], section: type[BaseModel], root: type[BaseModel], prefix: str) -> None:
    for key, value in table.items():
        field = section.model_fields.get(key)
        if field is None:
            raise ValueError(_unknown_key_message(f"{prefix}{str(key)[:_MAX_SHOWN]}", prefix, section, root))
        nested = nested_section(field.annotation)
        if nested is not None and isinstance(value, Mapping):
            _reject_unknown(value, nested, root, f"{prefix}{key}.")


def _unknown_key_message(key: str, prefix: str, section: type[BaseModel], root: type[BaseModel]) -> str:
    here = [f"{prefix}{name}" for name in section.model_fields]
    everywhere = [option for option, *_ in describe(root)]
    near = difflib.get_close_matches(key, here, n=1, cutoff=0.6) or difflib.get_close_matches(
        key, everywhere, n=1, cutoff=0.6
    )
    leaf = key.rsplit(".", 1)[-1]
    same_leaf = [option for option in everywhere if option.rsplit(".", 1)[-1] == leaf]
    nearest = next(iter(near or same_leaf), None)
    hint = f"did you mean {nearest}?" if nearest else f"known here: {', '.join(sorted(here))}"
    return f"unknown option {key}: {hint}"


def _explain(item: Mapping[str, Any], root: type[BaseModel]) -> str:
    location = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in item["loc"]).removeprefix(".")
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "missing":
        return f"option {location} is required: {message.lower()}"
    if item["type"] == "model_type":
        return (
            f"option {location}={shown(item['input'])} is not valid: {location} is a section; set the options below "
            f"it, such as {_first_option(location, root)}"
        )
    if item["type"] == "value_error" and isinstance(item["input"], Mapping | BaseModel):
        return f"{location}: {message}" if location else message
    default = next((text for key, _, text, _ in describe(root) if key == location and text != "required"), None)
    remedy = f"; the default is {default}" if default is not None else ""
    return f"option {location}={shown(item['input'])} is not valid: {_RULES.get(item['type'], message)}{remedy}"


def _first_option(section: str, root: type[BaseModel]) -> str:
    return next((key for key, *_ in describe(root) if key.startswith(f"{section}.")), f"{section}.name")


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
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}... ({len(text)} characters)"

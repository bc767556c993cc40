"""Reads a run file and its command-line overrides into a ``Config``; bad input is an error that names its option.

This file does NOT hold options or defaults (config.py), read the environment, touch torch or know ranks.
"""

from __future__ import annotations

import codecs
import datetime
import difflib
import hashlib
import itertools
import json
import math
import shlex
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from aer_megatron.config import Config

_MAX_FILE_BYTES = 1 << 24
_MAX_DEPTH = 32  # of tables and lists in one another
_MAX_INTEGER = 2**63  # TOML's integers have 64 bits
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


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Returns the run configuration of a TOML file with ``key.sub=value`` overrides applied on top.

    Values of overrides are TOML literals; what does not parse as one is taken as a string, and an option that is text
    takes it as it stands (``--run.name=2024``).

    Raises:
        ValueError: the file is missing or malformed, a key is unknown (the nearest one is named) or a value is of the
            wrong type or out of its range; the message starts with the dotted option.
    """
    return config_with_overrides({} if path is None else _read_table(Path(path)), overrides)


def config_with_overrides(table: dict[str, Any], overrides: Sequence[str]) -> Config:
    """Returns the configuration of a nested mapping, which changes, under ``key.sub=value`` overrides."""
    for override in overrides:
        _apply_override(table, override)
    return config_from_table(table)


def refuse_misspelt(arguments: Sequence[str], flags: Sequence[str] = ()) -> None:
    """Raises ValueError for an argument that is nearly ``--section.key=value``, with the right spelling.

    ``flags`` are the command's own options, which are left to it.
    """
    for argument, following in itertools.pairwise([*arguments, "--"]):
        name, separator, _ = argument.partition("=")
        if name in flags:
            continue
        if argument.startswith("--") and not separator:
            near = difflib.get_close_matches(name, flags, n=1, cutoff=0.7) if "." not in name else []
            if near:
                raise ValueError(f"{_shown(argument)} is not understood; did you mean {near[0]}?")
            value = "VALUE" if following.startswith("--") else following
            raise ValueError(
                f"{_shown(argument)} and its value must be one argument: write {shlex.quote(f'{argument}={value}')}"
            )
        if separator and not argument.startswith("--") and name.lstrip("-").split(".")[0] in Config.model_fields:
            raise ValueError(f"{_shown(argument)} is not understood: write {shlex.quote('--' + argument.lstrip('-'))}")


def config_from_table(table: Mapping[str, Any]) -> Config:
    """Returns the validated configuration of a nested mapping; errors as in ``load_config``."""
    _reject_unknown(table, Config, prefix="")
    _check_value(table, "", depth=0)
    try:
        return Config.model_validate(dict(table))
    except ValidationError as error:
        raise ValueError("\n".join(_explain(item) for item in error.errors())) from None


def config_digest(sections: Mapping[str, Any]) -> str:
    """Returns 16 hex digits that change with any value of ``sections`` (JSON-serialisable)."""
    text = json.dumps(sections, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def describe_options() -> Iterator[tuple[str, str, str, str]]:
    """Yields (dotted key, type, default, description) of every option, in file order."""
    yield from _describe(Config, prefix="")


def _describe(
    section: type[BaseModel], prefix: str, given: BaseModel | None = None
) -> Iterator[tuple[str, str, str, str]]:
    """Yields the options of a section; ``given`` holds its defaults where the parent sets its own."""
    for name, info in section.model_fields.items():
        value = getattr(given, name) if given is not None else info.get_default(call_default_factory=True)
        nested = _nested_section(info.annotation)
        if nested is not None:
            yield from _describe(nested, f"{prefix}{name}.", value if isinstance(value, BaseModel) else None)
            continue
        default = "required" if given is None and info.is_required() else json.dumps(value, default=str)
        kind = str(info.annotation).replace("typing.", "")
        kind = info.annotation.__name__ if isinstance(info.annotation, type) and "[" not in kind else kind
        yield f"{prefix}{name}", kind, default, info.description or ""


def _nested_section(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _read_table(path: Path) -> dict[str, Any]:
    path = path.expanduser()
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise ValueError(f"run file {path} does not exist; give the path of a TOML file") from None
    except OSError as error:
        raise ValueError(f"run file {path} cannot be read: {error.strerror}; give the path of a TOML file") from None
    if len(raw) > _MAX_FILE_BYTES:
        raise ValueError(f"run file {path} is larger than {_MAX_FILE_BYTES} bytes; give the path of a TOML file")
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in raw:
        raise ValueError(f"run file {path} is not valid TOML: it is no UTF-8 (UTF-16?); save it as UTF-8")
    try:
        return tomllib.loads(raw.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError(f"run file {path} is not usable: values are nested too deeply; write it flat") from None
    except ValueError as error:  # also of int(), which takes 4,300 digits at most
        raise ValueError(f"run file {path} is not valid TOML: {error}; correct it and save it as UTF-8") from None


def _check_value(value: Any, where: str, *, depth: int) -> None:
    """Raises ValueError for what no option takes, also inside tables that are passed on as they are."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"option {where[:_MAX_SHOWN]} is nested more than {_MAX_DEPTH} deep; write it flat")
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
        if not -_MAX_INTEGER <= value < _MAX_INTEGER:
            problem = "is beyond 64 bits; use a number from -2^63 to 2^63 - 1"
    elif isinstance(value, float):
        if not math.isfinite(value):
            problem = "must be a finite number; write one"
    elif isinstance(value, datetime.date | datetime.time):
        problem = "is a date or time, which no option takes; put it in quotes for text"
    if problem:
        raise ValueError(f"option {where}={_shown(value)} is not valid: it {problem}")


def _reject_unknown(table: Mapping[str, Any], section: type[BaseModel], prefix: str) -> None:
    for key, value in table.items():
        field = section.model_fields.get(key)
        if field is None:
            raise ValueError(_unknown_key_message(f"{prefix}{str(key)[:_MAX_SHOWN]}", prefix, section))
        nested = _nested_section(field.annotation)
        if nested is not None and isinstance(value, Mapping):
            _reject_unknown(value, nested, f"{prefix}{key}.")


def _unknown_key_message(key: str, prefix: str, section: type[BaseModel]) -> str:
    here = [f"{prefix}{name}" for name in section.model_fields]
    everywhere = [option for option, *_ in describe_options()]
    near = difflib.get_close_matches(key, here, n=1, cutoff=0.6) or difflib.get_close_matches(
        key, everywhere, n=1, cutoff=0.6
    )
    leaf = key.rsplit(".", 1)[-1]
    same_leaf = [option for option in everywhere if option.rsplit(".", 1)[-1] == leaf]
    nearest = next(iter(near or same_leaf), None)
    hint = f"did you mean {nearest}?" if nearest else f"known here: {', '.join(sorted(here))}"
    return f"unknown option {key}: {hint}"


def _apply_override(table: dict[str, Any], override: str) -> None:
    key, separator, text = override.removeprefix("--").partition("=")
    *parents, leaf = parts = key.split(".")
    if not separator or not all(part.strip() for part in parts):
        raise ValueError(f"override {_shown(override)} must look like section.key=value, without empty parts")
    if len(parts) > _MAX_DEPTH:
        raise ValueError(f"override {_shown(override)} has {len(parts)} parts; options have at most {_MAX_DEPTH}")
    node = table
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ValueError(
                f"override {_shown(override)}: {parent} is a value, not a table; drop the part after it, or the value"
            )
        node = child
    node[leaf] = parse_value(text, key)


def parse_value(text: str, key: str) -> Any:
    """Returns the value that ``text`` stands for on a command line, for the option with the dotted ``key``.

    A TOML literal; what does not parse as one is a string, and so is all but a quoted string where the option is text.

    Raises:
        ValueError: brackets are nested too deeply, or an integer has more digits than fit.
    """
    try:
        found = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    except (RecursionError, ValueError) as error:
        if _is_text(key.split(".")):
            return text
        reason = "nested too deeply" if isinstance(error, RecursionError) else "an integer with too many digits"
        raise ValueError(f"option {key}={_shown(text)} is not valid: it is {reason}; write a plain value") from None
    if set(found) != {"value"}:  # a line end in the text began a key of its own
        return text
    return text if _is_text(key.split(".")) and not isinstance(found["value"], str) else found["value"]


def _is_text(parts: Sequence[str]) -> bool:
    """Returns whether the option ``parts`` is a string (or none), or one of a table of strings."""
    section: type[BaseModel] = Config
    for index, part in enumerate(parts):
        field = section.model_fields.get(part)
        if field is None:
            return False
        nested = _nested_section(field.annotation)
        if nested is None:
            below = len(parts) - index - 1
            return field.annotation == dict[str, str] if below == 1 else not below and _takes_text(field.annotation)
        section = nested
    return False


def _takes_text(annotation: Any) -> bool:
    if get_origin(annotation) in (Union, UnionType):
        return all(member is NoneType or _takes_text(member) for member in get_args(annotation))
    if get_origin(annotation) is Literal:
        return all(isinstance(choice, str) for choice in get_args(annotation))
    return annotation is str


def _explain(item: Mapping[str, Any]) -> str:
    location = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in item["loc"]).removeprefix(".")
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "missing":
        return f"option {location} is required: {message.lower()}"
    if item["type"] == "model_type":
        return (
            f"option {location}={_shown(item['input'])} is not valid: {location} is a section; set the options below "
            f"it, such as {_first_option(location)}"
        )
    if item["type"] == "value_error" and isinstance(item["input"], Mapping | BaseModel):
        return f"{location}: {message}" if location else message
    default = next((text for key, _, text, _ in describe_options() if key == location and text != "required"), None)
    remedy = f"; the default is {default}" if default is not None else ""
    return f"option {location}={_shown(item['input'])} is not valid: {_RULES.get(item['type'], message)}{remedy}"


def _first_option(section: str) -> str:
    return next((key for key, *_ in describe_options() if key.startswith(f"{section}.")), f"{section}.name")


def _shown(value: Any) -> str:
    """Returns a value as a run file spells it, cut where it is long."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and abs(value) >= _MAX_INTEGER:
        return f"an integer of {value.bit_length()} bits"  # repr refuses 4,300 digits
    try:
        text = repr(value)
    except ValueError:
        text = f"a {type(value).__name__}"
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}... ({len(text)} characters)"

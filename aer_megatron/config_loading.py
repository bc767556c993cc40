"""Reads a run file and its command-line overrides into a ``Config``; bad input is an error that names its option.

This file does NOT hold options or defaults (options/), read the environment, touch torch or know ranks.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from aer_megatron.config import Config
from aer_megatron.config_section import named_sections, nested_section, overridden, rules_of
from aer_megatron.config_values import shown

_MAX_FILE_BYTES = 1 << 24


def load_config(
    path: str | Path | None, overrides: Sequence[str] = (), *, note: Callable[[str], object] | None = None
) -> Config:
    """Returns the run configuration of a TOML file with ``key.sub=value`` overrides applied on top.

    Values of overrides are TOML literals; what does not parse as one is taken as a string, and an option that is text
    takes it as it stands (``--run.name=2024``). An override of a rule's ``kind`` leaves out the file's options
    that the new rule does not have, and ``note`` is told which.

    Raises:
        ValueError: the file is missing or malformed, a key is unknown (the nearest one is named) or a value is of the
            wrong type or out of its range; the message starts with the dotted option.
    """
    table, left_out = overridden(Config, {} if path is None else _read_table(Path(path)), parse_overrides(overrides))
    config = Config.from_table(table)
    if left_out and note is not None:
        note(f"left out of {path}: {', '.join(left_out)}, which the kind of the command line does not have")
    return config


def config_digest(sections: Mapping[str, Any]) -> str:
    """Returns 16 hex digits that change with any value of ``sections`` (JSON-serialisable)."""
    text = json.dumps(sections, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Returns {dotted option: value} of all overrides, the last one of an option last; errors as ``parse_override``."""
    changes: dict[str, Any] = {}
    for override in overrides:
        for name, value in parse_override(override).items():
            changes.pop(name, None)
            changes[name] = value
    return changes


def parse_override(override: str) -> dict[str, Any]:
    """Returns {dotted option: value} of ``--section.key=value``; raises ValueError where it has another form."""
    key, separator, text = override.removeprefix("--").partition("=")
    if not separator:
        raise ValueError(f"override {shown(override)} must look like section.key=value, without empty parts")
    return {key: parse_value(text, key)}


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
        raise ValueError(f"option {key}={shown(text)} is not valid: it is {reason}; write a plain value") from None
    if set(found) != {"value"}:  # a line end in the text began a key of its own
        return text
    return text if _is_text(key.split(".")) and not isinstance(found["value"], str) else found["value"]


def _is_text(parts: Sequence[str], section: type[BaseModel] = Config) -> bool:
    """Returns whether the option ``parts`` of ``section`` is a string (or none), or one of a table of strings."""
    for index, part in enumerate(parts):
        field = section.model_fields.get(part)
        if field is None:
            return False
        below = parts[index + 1 :]
        named = named_sections(field.annotation)
        if named is not None:
            return _is_text(below[1:], named)
        rules = rules_of(field)
        nested = nested_section(field.annotation) if rules is None else rules.first_with(*below[:1])
        if nested is None:
            of_table = len(below) == 1 and field.annotation == dict[str, str]
            return of_table or (not below and _takes_text(field.annotation))
        section = nested
    return False


def _takes_text(annotation: Any) -> bool:
    if get_origin(annotation) in (Union, UnionType):
        return all(member is NoneType or _takes_text(member) for member in get_args(annotation))
    if get_origin(annotation) is Literal:
        return all(isinstance(choice, str) for choice in get_args(annotation))
    return annotation is str

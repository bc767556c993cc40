"""Reads a run file and its command-line overrides into a ``Config``; bad input is an error that names its option.

This file does NOT hold options or defaults (config.py), read the environment, touch torch or know ranks.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from aer_megatron.config import Config


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Returns the run configuration of a TOML file with ``key.sub=value`` overrides applied on top.

    Values of overrides are TOML literals; what does not parse as one is taken as a string.

    Raises:
        ValueError: the file is missing or malformed, a key is unknown (the nearest one is named) or a value is out
            of its range; the message starts with the dotted option.
    """
    table: dict[str, Any] = {}
    if path is not None:
        try:
            table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"run file {path} does not exist; give the path of a TOML file") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"run file {path} is not valid TOML: {error}") from None
    for override in overrides:
        _apply_override(table, override)
    return config_from_table(table)


def config_from_table(table: Mapping[str, Any]) -> Config:
    """Returns the validated configuration of a nested mapping; errors as in ``load_config``."""
    _reject_unknown(table, Config, prefix="")
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


def _reject_unknown(table: Mapping[str, Any], section: type[BaseModel], prefix: str) -> None:
    for key, value in table.items():
        field = section.model_fields.get(key)
        if field is None:
            raise ValueError(_unknown_key_message(f"{prefix}{key}", prefix, section))
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
    if not separator or not key:
        raise ValueError(f"override {override!r} must look like section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, leaf = key.split(".")
    node = table
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ValueError(f"override {override!r}: {parent} is a value, not a table")
        node = child
    node[leaf] = value


def _explain(item: Mapping[str, Any]) -> str:
    location = ".".join(str(part) for part in item["loc"])
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "missing":
        return f"option {location} is required: {message.lower()}"
    if item["type"] == "value_error":
        return f"{location}: {message}" if location else message
    return f"option {location}={item['input']!r} is not valid: {message}"

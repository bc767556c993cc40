"""Fuzz targets of what the user writes: run files, overrides, data files."""

from __future__ import annotations

import json
import math
import random
import tomllib
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from aer_megatron.config import Config
from aer_megatron.config_loading import load_config
from aer_megatron.config_section import ANY_NAME, describe, named_sections, rules_of
from aer_megatron.data.records import Record
from aer_megatron.data.sources import load_records
from aer_megatron.options.data import SourceSection
from benchmarks.reliability.fuzz_mutators import (
    mutate_bytes,
    mutate_jsonl,
    mutate_tree,
    odd_values,
    toml_key,
    toml_text,
)
from benchmarks.reliability.fuzz_target import Target, WrongAccept, target
from tests.support.runs import ROOT, RUN_FILE

_LARGEST = 2**63
_NO_LITERALS = ("required", "null")  # of defaults
_SURROGATES = range(0xD800, 0xE000)


def run_files() -> list[bytes]:
    """Returns run files: the project's examples and that of the tests."""
    paths = sorted((ROOT / "examples").glob("*/*.toml"))
    return [RUN_FILE.format(folder="F", base="F/base", model="M").encode(), *(path.read_bytes() for path in paths)]


def mutate_run_file(data: bytes, chance: random.Random) -> bytes:
    """Returns a damaged run file: mostly one of another value somewhere."""
    if chance.random() < 0.2:
        return mutate_bytes(data, chance)
    table = tomllib.loads(data.decode())
    if chance.random() < 0.5:  # an option that the example does not set
        name = chance.choice(_options())[0]
        _put(table, name, odd_values(chance))
    else:
        table = mutate_tree(table, chance)
    if not isinstance(table, dict):
        return toml_text(table).encode("utf-8", "surrogatepass")
    lines = [f"{toml_key(str(key))} = {toml_text(value)}" for key, value in table.items()]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def read_run_file(valid: bytes, data: bytes, folder: Path) -> None:
    """Raises WrongAccept where a value of the wrong type was taken."""
    path = folder / "run.toml"
    path.write_bytes(data)
    load_config(path)
    check_types(tomllib.loads(data.removeprefix(b"\xef\xbb\xbf").decode()), Config, "")


def overrides() -> list[bytes]:
    """Returns one override per option, with its default, as far as the rules of the run file have it."""
    known = Config.from_table(tomllib.loads(RUN_FILE.format(folder="F", base="F/base", model="M")))
    return [
        f"--{name}={default}".encode()
        for name, default in dict(reversed(_options())).items()  # of an option of several rules that of the first
        if default not in _NO_LITERALS and _has(known, name)
    ]


def _has(config: Any, name: str) -> bool:
    *sections, leaf = name.split(".")
    for section in sections:
        config = config[section] if isinstance(config, Mapping) else getattr(config, section, config)
    return hasattr(config, leaf)


def mutate_override(data: bytes, chance: random.Random) -> bytes:
    """Returns an override with another value, or damaged."""
    if chance.random() < 0.3:
        return mutate_bytes(data, chance)
    name = data.partition(b"=")[0]
    return name + b"=" + toml_text(odd_values(chance)).encode("utf-8", "surrogatepass")


def read_override(valid: bytes, data: bytes, folder: Path) -> None:
    """Raises WrongAccept where a value of the wrong type was taken."""
    path = folder / "base.toml"
    if not path.exists():
        path.write_text(
            RUN_FILE.format(folder="F", base="F/base", model="M").replace("num_samples = 4", "num_samples = 32")
        )
    word = data.decode("utf-8", "surrogateescape")
    load_config(path, [word])
    key, _, text = word.removeprefix("--").partition("=")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError, ValueError):
        return  # a string
    table: dict[str, Any] = {}
    _put(table, key, value)
    check_types(table, Config, "", strings_from_numbers=True)


def check_types(
    given: Mapping[str, Any], section: type[BaseModel], prefix: str, *, strings_from_numbers: bool = False
) -> None:
    """Raises WrongAccept for a value, accepted in ``section``, that is not of its option's type.

    ``strings_from_numbers``: a command line has no quotes, so that there 5 is a string for an option that takes one.
    """
    for key, value in given.items():
        name = f"{prefix}{key}"
        if key not in section.model_fields:
            raise WrongAccept(f"unknown option {name!r}")
        annotation = section.model_fields[key].annotation
        rules = rules_of(section.model_fields[key])
        if rules is not None and isinstance(value, Mapping):
            rule = rules.choose(value) if "kind" in value else rules.first_with(*value)
            check_types(value, rule, f"{name}.", strings_from_numbers=strings_from_numbers)
            continue
        named = named_sections(annotation)
        if named is not None and isinstance(value, Mapping):
            for each, item in value.items():
                if isinstance(item, Mapping):
                    check_types(item, named, f"{name}.{each}.", strings_from_numbers=strings_from_numbers)
            continue
        nested = [item for item in _leaves(annotation) if isinstance(item, type) and issubclass(item, BaseModel)]
        if nested and isinstance(value, Mapping):
            check_types(value, nested[0], f"{name}.", strings_from_numbers=strings_from_numbers)
            continue
        kinds = set(_leaves(annotation))
        if Any in kinds or nested or (strings_from_numbers and str in kinds):
            continue
        for item in value if isinstance(value, list) else [value]:
            if (problem := _mismatch(item, kinds)) is not None:
                raise WrongAccept(f"{name}: {problem}: {str(item)[:60]}")


def _mismatch(value: Any, kinds: set[Any]) -> str | None:
    """Returns why ``value`` cannot be of one of ``kinds``; None where it can."""
    if isinstance(value, bool):
        return None if bool in kinds else "a boolean"
    if isinstance(value, str):
        return None if str in kinds else "text"
    if isinstance(value, float) and not math.isfinite(value):
        return "not finite"
    if isinstance(value, int) and abs(value) >= _LARGEST:
        return "an integer beyond 64 bits"
    if isinstance(value, (int, float)) and not kinds & {int, float}:
        return "a number"
    return None


def _leaves(annotation: Any) -> Iterator[Any]:
    """Yields the types that an annotation is made of."""
    origin = get_origin(annotation)
    if origin is Literal:
        yield from {type(value) for value in get_args(annotation)}
    elif origin is Annotated:
        yield from _leaves(get_args(annotation)[0])
    elif origin in (Union, types.UnionType, tuple, dict):
        for item in get_args(annotation):
            yield from _leaves(item)
    else:
        yield annotation


def _options() -> list[tuple[str, str]]:
    return [(name.replace(ANY_NAME, "countdown"), default) for name, _, default, _ in describe(Config)]


def _put(table: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    for parent in parents:
        inner = table.setdefault(parent, {})
        if not isinstance(inner, dict):
            return
        table = inner
    table[leaf] = value


def data_files() -> list[bytes]:
    """Returns JSONL files of problems."""
    rows: list[dict[str, Any]] = [
        {"problem": "3,5,2,8=24>", "answer": "24", "verifier": "countdown", "id": 7},
        {"prompt": "What is 1/2?", "answer": "0.5", "level": 3, "tags": ["a", "b"]},
        {"problem": "x", "answer": 12, "response": "12"},
        {"prompt": [{"role": "user", "content": "2+2"}], "answer": "4", "data_source": "s"},
    ]
    return [b"".join(json.dumps(row).encode() + b"\n" for row in rows[:3]), json.dumps(rows[0]).encode() + b"\n"]


def read_data_file(valid: bytes, data: bytes, folder: Path) -> None:
    """Raises WrongAccept for a record that is no problem with an answer."""
    path = folder / "data.jsonl"
    path.write_bytes(data)
    source = SourceSection(path=str(path))
    for how in ("skip", "error"):
        for record in _records(source, how):
            if isinstance(record.id, bool) or not isinstance(record.id, int) or not 0 <= record.id < 2**64:
                raise WrongAccept(f"id: {record.id!r}")
            if record.verifier not in ("math", "countdown"):
                raise WrongAccept(f"verifier: {record.verifier!r:.60}")
            for name in ("answer", "verifier"):
                text = getattr(record, name)
                if not isinstance(text, str) or not text or any(ord(letter) in _SURROGATES for letter in text):
                    raise WrongAccept(f"{name}: {text!r:.60}")


def _records(source: SourceSection, how: Any) -> Sequence[Record]:
    may_name = {"math", "countdown"}.__contains__
    return load_records(source, on_bad_record=how, default_verifier="math", may_name=may_name).records


SETTING_TARGETS: tuple[Target, ...] = (
    target("run_file", run_files, mutate_run_file, read_run_file, share=12),
    target("override", overrides, mutate_override, read_override, share=12),
    target("data_file", data_files, mutate_jsonl, read_data_file, share=14),
)

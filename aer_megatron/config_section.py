"""A section of the run file: a frozen, strict table whose bad input is an error that names option, value and remedy.

This file does NOT hold options (options/, algo/options.py) or read files (config_loading.py).
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from aer_megatron.config_values import MAX_DEPTH, MAX_SHOWN, check_value, shown

ANY_NAME = "NAME"  # in the documentation, the name of a section that a table of sections holds
IMPORTABLE = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)
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
    moved: ClassVar[Mapping[str, str]] = {}  # what is told who gives an option of former versions, by its dotted name

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> Self:
        """Returns the validated section of a nested mapping.

        Raises:
            ValueError: a key is unknown (the nearest one is named) or a value is of the wrong type or out of its range;
                the message starts with the dotted option.
        """
        _reject_unknown(table, cls, cls, prefix="")
        check_value(table, "", depth=0)
        try:
            return cls.model_validate(dict(table))
        except ValidationError as error:
            raise ValueError("\n".join(_explain(item, cls) for item in error.errors())) from None

    def with_options(self, changes: Mapping[str, Any]) -> Self:
        """Returns the section with options changed, validated as a whole; errors as in ``from_table``.

        Args:
            changes: by dotted name, ``{"parallel.tp": 2, "sft.source": None}``; a table replaces a whole table, and the
                ``kind`` of another rule the options that only the former one has.
        """
        return self.from_table(overridden(type(self), self.model_dump(exclude_unset=True), changes)[0])


class Rule(Section):
    """A section that is a rule: ``kind`` says which one, the other fields are its own options."""

    kind: str

    def model_post_init(self, context: Any) -> None:
        self.model_fields_set.add("kind")  # also where it is the default: without it the options mean nothing


class OneOf:
    """Says of a field which rules it may hold: ``Annotated[PolicyLoss, OneOf(PolicyLoss, Clip, KlCov)]``.

    The table's ``kind`` chooses, the first rule without one. ``kind = "package.module:name"`` is a class of a
    run's own, derived from ``base``.
    """

    def __init__(self, base: type[Rule], *rules: type[Rule]) -> None:
        self.base = base
        self.rules = {str(rule.model_fields["kind"].default): rule for rule in rules}

    def choose(self, table: Mapping[str, Any]) -> type[Rule]:
        """Returns the rule that a table is of.

        Raises:
            ValueError: no rule has its ``kind``, or the class that it names cannot be imported or is no such rule.
        """
        kind = table.get("kind", next(iter(self.rules)))
        if not isinstance(kind, str) or not (kind in self.rules or IMPORTABLE.fullmatch(kind)):
            known = ", ".join(map(repr, self.rules))
            raise ValueError(
                f"kind={shown(kind)} is not valid: must be {known} or 'package.module:name', a class of yours"
            )
        return self.rules[kind] if kind in self.rules else _own_rule(kind, self.base)

    def first_with(self, *options: str) -> type[Rule]:
        """Returns the first rule that has ``options``, the base where none has them."""
        return next((rule for rule in self.rules.values() if {*options} <= rule.model_fields.keys()), self.base)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._validate)

    def _validate(self, value: Any) -> Rule:
        if isinstance(value, self.base):
            return value
        if not isinstance(value, Mapping):
            raise PydanticCustomError("model_type", "must be a table")
        return self.choose(value).model_validate(dict(value))


def rules_of(field: FieldInfo) -> OneOf | None:
    """Returns the rules that a field may hold; None for any other field."""
    return next((item for item in field.metadata if isinstance(item, OneOf)), None)


TRUST_CODE = "trust-code"  # the switch of commands that read a recorded configuration


def refuse_recorded_code(table: Any, source: object, *, trusted: bool) -> None:
    """Raises ValueError where a recorded configuration names a class of a user's own, unless that is ``trusted``.

    A run file is the user's word; what a file of a run folder says is not, and the class would be imported.
    """
    waiting: list[tuple[str, Any]] = [] if trusted else [("", table)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += [(f"{name}.{key}".lstrip("."), item) for key, item in value.items()]
        elif name.endswith(".kind") and isinstance(value, str) and IMPORTABLE.fullmatch(value):
            raise ValueError(f"{source} names code, {name}={value!r}; if it is yours, give --{TRUST_CODE} to import it")


def _own_rule(kind: str, base: type[Rule]) -> type[Rule]:
    """Returns the class that ``kind`` names, checked against ``base``."""
    module, _, name = kind.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:
        raise ValueError(
            f"kind={kind!r} cannot be imported: {type(error).__name__}: {error}; it must be 'package.module:name', a "
            f"class on the Python path (PYTHONPATH)"
        ) from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f"kind={kind!r} must be a class derived from {base.__module__}.{base.__name__}")
    if missing := sorted(getattr(found, "__abstractmethods__", ())):
        raise ValueError(f"kind={kind!r} must define {', '.join(missing)}, as {base.__module__}.{base.__name__} says")
    ours = next(each for each in found.__mro__ if each.__module__.startswith(f"{__package__}."))
    for method, wanted in inspect.getmembers(ours, inspect.isfunction):
        if method.startswith("_") or getattr(Rule, method, None) is wanted:
            continue
        parameters = list(inspect.signature(wanted).parameters.values())
        named = [item.name for item in parameters if item.kind is item.KEYWORD_ONLY]
        try:
            inspect.signature(getattr(found, method)).bind(
                *parameters[: len(parameters) - len(named)], **dict.fromkeys(named)
            )
        except TypeError as error:
            raise ValueError(
                f"kind={kind!r}: {method}{inspect.signature(getattr(found, method))} is called as "
                f"{method}{inspect.signature(wanted)}: {error}"
            ) from None
    return found


def overridden(
    section: type[Section], table: Mapping[str, Any], changes: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Returns (the table of ``section`` with ``changes`` as in ``merged``, the options of it that were left out).

    Those are the options of a rule whose ``kind`` a change replaces, which the new rule does not have.

    Raises:
        ValueError: as in ``merged``.
    """
    result, left_out = dict(table), list[str]()
    for name, value in changes.items():
        where, _, leaf = name.rpartition(".")
        rules, given = _rules_at(section, where.split(".")) if leaf == "kind" else None, _value_at(table, where)
        if rules is None or not isinstance(given, Mapping):
            continue
        try:
            former, chosen = rules.choose(given), rules.choose({"kind": value})
        except ValueError:
            continue  # from_table says what is wrong
        gone = [key for key in given if key != "kind" and _owner(former, key) not in (None, _owner(chosen, key))]
        result = merged(result, {where: {key: item for key, item in given.items() if key not in gone}})
        left_out += [f"{where}.{key}" for key in gone]
    return merged(result, changes), left_out


def _rules_at(section: type[BaseModel], parts: Sequence[str]) -> OneOf | None:
    """Returns the rules that the field with a dotted name may hold; None where it is no such field."""
    field = section.model_fields.get(parts[0])
    if field is None or len(parts) == 1:
        return None if field is None else rules_of(field)
    nested = nested_section(field.annotation)
    return None if nested is None else _rules_at(nested, parts[1:])


def _value_at(table: Mapping[str, Any], name: str) -> Any:
    value: Any = table
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _owner(rule: type[Rule], option: str) -> type | None:
    """Returns the class that declares an option of a rule: two rules share an option that they inherit."""
    return next((each for each in rule.__mro__ if option in inspect.get_annotations(each)), None)


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

    ``given`` holds the defaults where the parent sets its own. In a table of sections ``NAME`` stands for their names.
    """
    for name, info in section.model_fields.items():
        value = getattr(given, name) if given is not None else info.get_default(call_default_factory=True)
        if (rules := rules_of(info)) is not None:
            yield from _describe_rules(rules, f"{prefix}{name}.", value, info.description or "")
            continue
        if (named := named_sections(info.annotation)) is not None:
            yield from describe(named, f"{prefix}{name}.{ANY_NAME}.")
            continue
        nested = nested_section(info.annotation)
        if nested is not None:
            yield from describe(nested, f"{prefix}{name}.", value if isinstance(value, BaseModel) else None)
            continue
        default = "required" if given is None and info.is_required() else json.dumps(value, default=str)
        kind = str(info.annotation).replace("typing.", "")
        kind = info.annotation.__name__ if isinstance(info.annotation, type) and "[" not in kind else kind
        yield f"{prefix}{name}", kind, default, info.description or ""


def _describe_rules(rules: OneOf, prefix: str, given: Rule, text: str) -> Iterator[tuple[str, str, str, str]]:
    """Yields ``kind``, then the options of all rules, each with the kinds that have it where not all do."""
    yield f"{prefix}kind", " | ".join(rules.rules), json.dumps(given.kind), f"{text}; or 'package.module:name'"
    kinds_of: dict[tuple[str, str, str, str], list[str]] = {}
    for kind, rule in rules.rules.items():
        for option in describe(rule, prefix, given if type(given) is rule else None):
            if option[0] != f"{prefix}kind":
                kinds_of.setdefault(option, []).append(kind)
    for (key, form, default, meaning), kinds in kinds_of.items():
        yield key, form, default, meaning + (f" (kind = {', '.join(kinds)})" if len(kinds) < len(rules.rules) else "")


def nested_section(annotation: Any) -> type[BaseModel] | None:
    """Returns the section that a field of this type holds; None for an option, and for a table of sections."""
    for candidate in () if get_origin(annotation) is dict else (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def named_sections(annotation: Any) -> type[BaseModel] | None:
    """Returns the section that a table holds under names of the user's choice; None for any other field."""
    value = get_args(annotation)[1] if get_origin(annotation) is dict else None
    return value if isinstance(value, type) and issubclass(value, BaseModel) else None


def _reject_unknown(table: Mapping[str, Any], section: type[BaseModel], root: type[Section], prefix: str) -> None:
    for key, value in table.items():
        field, name = section.model_fields.get(key), f"{prefix}{str(key)[:MAX_SHOWN]}"
        if name in root.moved and not (field and isinstance(value, Mapping)):
            raise ValueError(f"option {name}={shown(value)} is no longer there: {root.moved[name]}")
        if field is None:
            raise ValueError(_unknown_key_message(name, prefix, section, root))
        if isinstance(value, Mapping) and (rules := rules_of(field)) is not None:
            _reject_unknown_of_rule(value, rules, root, f"{name}.")
        elif isinstance(value, Mapping) and (nested := nested_section(field.annotation)) is not None:
            _reject_unknown(value, nested, root, f"{name}.")
        elif isinstance(value, Mapping) and (named := named_sections(field.annotation)) is not None:
            for key, item in value.items():
                if isinstance(item, Mapping):
                    _reject_unknown(item, named, root, f"{name}.{str(key)[:MAX_SHOWN]}.")


def _reject_unknown_of_rule(table: Mapping[str, Any], rules: OneOf, root: type[Section], prefix: str) -> None:
    try:
        rule = rules.choose(table)
    except ValueError as error:
        raise ValueError(f"option {prefix}{error}") from error
    for key in table:
        owners = [kind for kind, other in rules.rules.items() if key in other.model_fields]
        if key not in rule.model_fields and owners:
            kind = table.get("kind", next(iter(rules.rules)))
            raise ValueError(
                f"option {prefix}{key} is not one of kind={kind!r}; kinds that have it: {', '.join(owners)}"
            )
    _reject_unknown(table, rule, root, prefix)


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
    default = next(
        (text for key, _, text, _ in describe(root) if _stands_for(key, location) and text != "required"), None
    )
    remedy = f"; the default is {default}" if default is not None else ""
    return f"option {location}={shown(item['input'])} is not valid: {_RULES.get(item['type'], message)}{remedy}"


def _first_option(section: str, root: type[BaseModel]) -> str:
    parts = section.split(".")
    below = (key.split(".") for key, *_ in describe(root))
    first = next((key for key in below if _stands_for(".".join(key[: len(parts)]), section)), [*parts, "name"])
    return ".".join([*parts, *first[len(parts) :]])


def _stands_for(described: str, option: str) -> bool:
    """Returns whether ``describe`` spells ``option`` so."""
    return len(described.split(".")) == len(option.split(".")) and all(
        part in (ANY_NAME, given) for part, given in zip(described.split("."), option.split("."), strict=True)
    )

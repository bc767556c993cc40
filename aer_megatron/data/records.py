"""What makes a row of a file a problem record: its fields, their types, and a stable id.

The one place that knows how fields are called: this project's own names and those of verl's and slime's files.

    problem       "problem" or "prompt": a text, or a list of messages {"role", "content"}
    answer        "answer", else "reward_model" {"ground_truth"} (verl) or "label" (slime): a text or a number
    response      the text to imitate, in supervised data
    verifier, id  optional; every other field is kept as metadata

This file does NOT read files (data/rows.py) or make token ids (data/prompts.py).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, NamedTuple

from aer_megatron.data.rows import MAX_ROW_BYTES
from aer_megatron.files.json_input import kind_of

_KNOWN_FIELDS = frozenset({"problem", "prompt", "answer", "verifier", "id", "response"})
_ROLES = ("system", "user", "assistant")
_MAX_MESSAGES = 1000
_MAX_DEPTH = 32
_MAX_ID = 2**64


class Message(NamedTuple):
    role: str  # "system", "user" or "assistant"
    content: str


Conversation = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Record:
    """One problem as its source states it.

    ``conversation`` is set where the source gives more than one message of a user: it ends in that message, which is
    ``problem``.

    Example: ``Record(id=0x9AE1, problem="3,5,2,8=24>", answer="24", verifier="countdown", response=None)``
    """

    id: int  # unsigned 64-bit
    problem: str
    answer: str
    verifier: str
    response: str | None  # only supervised data has one
    metadata: Mapping[str, Any] = field(default_factory=dict)  # the fields this project does not know
    conversation: Conversation = ()

    @property
    def prompt(self) -> str | Conversation:
        """What is put to the model: the problem, or the conversation."""
        return self.conversation or self.problem


class Rules(NamedTuple):
    """What makes a record of a file good."""

    needs: str  # "answer" or "response"
    default_verifier: str
    may_name: Callable[[str], bool]  # whether a record may name this verifier


def parse_record(row: Any, rules: Rules) -> Record:
    """Returns the record that a row stands for; raises ValueError with what is wrong with it."""
    if not isinstance(row, dict):
        raise ValueError(f"a record must be an object, this is {kind_of(row)}")
    row = {key: value for key, value in row.items() if value is not None}
    if "problem" in row and "prompt" in row:
        raise ValueError('a record has "problem" or "prompt", not both')
    conversation = _conversation(row["prompt"]) if isinstance(row.get("prompt"), list) else ()
    if conversation:
        problem = conversation[-1].content
    else:
        problem = _text(row, "problem" if "problem" in row else "prompt", missing='"problem" (or "prompt")')
    response = _text(row, "response") if "response" in row or rules.needs == "response" else None
    answer_field, answer = _answer(row, needed=rules.needs == "answer")
    verifier = _verifier(row, rules) if "verifier" in row else rules.default_verifier
    metadata = {key: value for key, value in row.items() if key not in _KNOWN_FIELDS | {answer_field}}
    for key, value in metadata.items():
        _check_metadata(key, value)
    if len(conversation) == 1:  # the same as its text
        conversation = ()
    content_id = stable_id(*(part for message in conversation[:-1] for part in message), problem, answer)
    number = _parse_id(row.get("id"), content_id)
    return Record(number, problem, answer, verifier, response, metadata, conversation)


def stable_id(*parts: str) -> int:
    """Returns an unsigned 64-bit id of ``parts``: BLAKE2b over their UTF-8 bytes, lengths included.

    It is the same on every machine, Python version and process (unlike ``hash``).

    Raises:
        ValueError: a part holds a lone surrogate and is no valid text.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return int.from_bytes(digest.digest(), "little")


def _conversation(value: list[Any]) -> Conversation:
    if not 0 < len(value) <= _MAX_MESSAGES:
        raise ValueError(f'"prompt" is a list of {len(value)} messages; it must have 1 to {_MAX_MESSAGES}')
    messages = tuple(_message(item, f'"prompt"[{index}]') for index, item in enumerate(value))
    if any(message.role == "system" for message in messages[1:]):
        raise ValueError('"prompt" has a system message that is not the first')
    if messages[-1].role != "user":
        raise ValueError(f'"prompt" ends in a message of {messages[-1].role!r}; the model answers one of "user"')
    return messages


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise ValueError(f'{where} must be a message, {{"role", "content"}}, it is {kind_of(value)}')
    given = {key: item for key, item in value.items() if item is not None}
    if given.keys() != {"role", "content"}:
        raise ValueError(
            f'{where} must have "role" and "content" and nothing else, it has {sorted(map(str, given))[:8]}'
        )
    if given["role"] not in _ROLES:
        raise ValueError(
            f'{where}."role" must be {", ".join(_ROLES[:-1])} or {_ROLES[-1]}, it is {given["role"]!r:.40}'
        )
    return Message(given["role"], _check_text(given["content"], f'{where}."content"'))


def _answer(row: Mapping[str, Any], *, needed: bool) -> tuple[str, str]:
    """Returns the field that holds the answer and the answer; ("", "") where there is none and none is needed."""
    if "answer" in row or not needed:
        return ("answer", _text(row, "answer", numbers=True)) if "answer" in row else ("", "")
    model = row.get("reward_model")
    found = {}
    if isinstance(model, dict) and model.get("ground_truth") is not None:
        found["reward_model"] = _check_text(model["ground_truth"], '"reward_model"."ground_truth"', numbers=True)
    if "label" in row:
        found["label"] = _text(row, "label", numbers=True)
    if len(set(found.values())) > 1:
        raise ValueError('"reward_model"."ground_truth" and "label" are two answers; name the one that counts "answer"')
    if not found:
        raise ValueError(
            f'"answer" (or "reward_model"."ground_truth", or "label") is missing; the record has {sorted(row)}'
        )
    name, answer = next(iter(found.items()))
    return name if name == "label" else "", answer  # reward_model holds more than the answer and stays


def _verifier(row: Mapping[str, Any], rules: Rules) -> str:
    name = _text(row, "verifier")
    if name != rules.default_verifier and not rules.may_name(name):
        raise ValueError(
            f'"verifier"={name[:80]!r} is neither built in (math, math_verify, countdown, reasoning_gym:NAME) nor '
            "listed in data.verifiers; a record cannot name code by itself: list the function there if it is yours"
        )
    return name


def _text(row: Mapping[str, Any], key: str, *, missing: str = "", numbers: bool = False) -> str:
    if key not in row:
        raise ValueError(f"{missing or json.dumps(key)} is missing; the record has {sorted(row)}")
    return _check_text(row[key], json.dumps(key), numbers=numbers)


def _check_text(value: Any, where: str, *, numbers: bool = False) -> str:
    """Returns the text that the field ``where`` holds; raises ValueError where it is none."""
    if numbers and isinstance(value, int | float) and not isinstance(value, bool):
        value = _spell_number(value, where)
    if not isinstance(value, str):
        raise ValueError(f"{where} must be text, it is {kind_of(value)}")
    if not value.strip():
        raise ValueError(f"{where} is empty")
    if len(value) > MAX_ROW_BYTES:
        raise ValueError(f"{where} has {len(value)} characters; the rule is at most {MAX_ROW_BYTES}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where} holds a lone surrogate and is no valid text") from None
    return value


def _spell_number(value: float, where: str) -> str:
    """Returns the decimal digits of ``value``: no verifier takes 1e-05 for a number."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}={value} is no number; write the answer itself")
    try:
        return format(Decimal(repr(value)), "f")
    except ValueError:  # repr of an integer with more than 4,300 digits, which Parquet may hold
        raise ValueError(f"{where} is an integer of more than 4,300 digits; write it as text") from None


def _parse_id(value: Any, content_id: int) -> int:
    if value is None:
        return content_id
    if isinstance(value, str) and value.strip():
        return stable_id(value)
    if isinstance(value, int) and not isinstance(value, bool):
        if 0 <= value < _MAX_ID:
            return value
        raise ValueError(f'"id"={value} is outside 0 .. 2^64 - 1; use a text id, it is hashed')
    raise ValueError(f'"id" must be a whole number or a non-empty text, it is {kind_of(value)}')


def _check_metadata(name: str, value: Any) -> None:
    """Raises ValueError for what could not be sent to a verifier process: it would end the run at its first verdict."""
    level, depth = [value], 0
    while level:
        if depth > _MAX_DEPTH:
            raise ValueError(f"{json.dumps(name)} is nested deeper than {_MAX_DEPTH} levels")
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += item.values()
            elif isinstance(item, list | tuple):
                below += item
            elif item is not None and not isinstance(item, bool | int | float | str):
                raise ValueError(f"{json.dumps(name)} holds {kind_of(item)}, which JSON has not; leave the field out")
        level, depth = below, depth + 1

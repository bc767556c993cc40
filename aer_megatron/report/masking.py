"""Keeps secrets out of what a run writes and prints: API keys, tokens and passwords become ``***``.

A value is masked for its name (``HF_TOKEN``, ``--api-key``), also inside a text (``"api_key": "..."``, ``?token=...``),
and for its form (``sk-...``, ``hf_...``, ``https://user:password@host``). Two configurations are compared masked, so
that the difference of two secrets is not printed either.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

MASK = "***"

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
# wherever they stand in a name without its separators
_SECRETS = re.compile(
    r"secret|passw|passphrase|credential|authorization|cookie"
    r"|(api|access|private|session|auth|license|signing|encryption)_?(key|token)"
)
_LAST_WORDS = {"key", "keys", "token", "auth", "pass", "pwd", "pat", "bearer"}  # secret where a name ends in them
# what only names a secret or says where it is, and the tokenizer's own tokens
_HARMLESS = re.compile(r"(?i).*[_-](env|file|path|name|type|size|map)|(stop|pad|eos|bos|unk|mask|image)_token")
_FORMS = re.compile(
    r"\b(?:sk-[\w-]{16,}|hf_\w{16,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|AKIA[0-9A-Z]{16}"
    r"|xox[abprs]-[\w-]{10,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]+)|(?<=Bearer )\S+|(?<=Basic )[\w+/=]{8,}"
)
_USER_OF_URL = re.compile(r"(?<=://)[^/\s@]+(?=@)")
_NAME = re.compile(r"(?P<flag>--?)?[A-Za-z_][\w.-]*(?P<between>[\"']?\s*[:=]\s*|\s+(?=[^\s-]))")
_VALUE = re.compile(r"(?P<quote>[\"']?)(?P<text>(?<=\")[^\"]*|(?<=')[^']*|[^\s,;&}\]\"']+)")
_FLAG = re.compile(r"--?[A-Za-z][\w.-]*")


def is_secret_name(name: str) -> bool:
    """Returns whether a value of this name is a secret. Example: ``is_secret_name("sglang.environment.HF_TOKEN")``."""
    name = name.rsplit(".", 1)[-1].lstrip("-")
    words = [word.lower() for word in _WORDS.findall(name)]
    while words and words[-1].isdigit():
        words.pop()
    if not words or _HARMLESS.fullmatch(name):
        return False
    return bool(_SECRETS.search("_".join(words))) or words[-1] in _LAST_WORDS


def mask_table(table: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of nested tables, lists and plain values in which secrets are ``***``."""
    return {str(name): _masked(value, secret=is_secret_name(str(name))) for name, value in table.items()}


def mask_arguments(arguments: Sequence[Any]) -> list[Any]:
    """Returns the words of a command line, ``--api-key VALUE`` and ``--api-key=VALUE`` masked."""
    masked: list[Any] = []
    for position, word in enumerate(arguments):
        before = arguments[position - 1] if position else None
        secret = isinstance(before, str) and bool(_FLAG.fullmatch(before)) and is_secret_name(before)
        masked.append(_masked(word, secret=secret))
    return masked


def mask_text(text: str) -> str:
    """Returns ``text`` without the secrets that it spells."""
    text = _USER_OF_URL.sub(MASK, _FORMS.sub(MASK, text))
    parts, place = [], 0
    for name in _NAME.finditer(text):
        if name.start() < place or not is_secret_name(name[0].removesuffix(name["between"])):
            continue
        if name["between"].strip() in ("", ":") and not (name["flag"] or _SECRETS.search(name[0].lower())):
            continue  # a sentence: "the token is", "key: value"
        value = _VALUE.match(text, name.end())
        if value is not None:
            parts += [text[place : value.start("text")], MASK]
            place = value.end()
    return "".join([*parts, text[place:]])


def _masked(value: Any, *, secret: bool) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _masked(entry, secret=secret or is_secret_name(str(name))) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_masked(entry, secret=True) for entry in value] if secret else mask_arguments(value)
    if value is None or isinstance(value, bool) or value == "":
        return value
    if secret:
        return MASK
    return mask_text(value) if isinstance(value, str) else value

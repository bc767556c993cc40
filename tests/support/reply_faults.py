"""Answers to /generate that cannot be right: what a broken or hostile server may send."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from typing import Any, Literal

SpoiledReply = Literal[
    "nan",
    "counts",
    "wrong_version",
    "foreign_version",
    "version_of_5000_digits",
    "not_json",
    "beyond_vocabulary",
    "negative_id",
    "id_2_63",
    "id_true",
    "logprob_beyond_fp32",
    "logprob_of_400_digits",
    "positive_logprob",
    "short_length",
    "number_of_5000_digits",
    "nested",
    "endless",
    "gzip_bomb",
    "list",
    "null",
]
_OTHER_RUN = "aer-fedcba9876543210"
_LONG = 1_000_000  # bytes: far beyond any answer to the tests' requests


def _last_id(value: Any) -> Callable[[Any], None]:
    def apply(reply: Any) -> None:
        reply["output_ids"][-1] = reply["meta_info"]["output_token_logprobs"][-1][1] = value

    return apply


def _last_logprob(value: Any) -> Callable[[Any], None]:
    def apply(reply: Any) -> None:
        reply["meta_info"]["output_token_logprobs"][-1][0] = value

    return apply


def _version(change: Callable[[str], str]) -> Callable[[Any], None]:
    def apply(reply: Any) -> None:
        span = reply["meta_info"]["weight_versions"][0]
        span["version"] = change(span["version"])

    return apply


def _counts(reply: Any) -> None:
    reply["meta_info"]["output_token_logprobs"].pop()


def _short_length(reply: Any) -> None:
    meta = reply["meta_info"]
    del reply["output_ids"][2:], meta["output_token_logprobs"][2:]
    meta["completion_tokens"] = meta["weight_versions"][0]["end"] = 2
    meta["finish_reason"] = {"type": "length", "length": 2}


_EDITS: dict[str, Callable[[Any], None]] = {
    "nan": _last_logprob(math.nan),
    "counts": _counts,
    "wrong_version": _version(lambda label: f"{label.rpartition('/')[0]}/99999"),
    "foreign_version": _version(lambda label: f"{_OTHER_RUN}/{label.rpartition('/')[2]}"),
    "version_of_5000_digits": _version(lambda label: f"{label.rpartition('/')[0]}/{'9' * 5000}"),
    "beyond_vocabulary": _last_id(1_000_000),
    "negative_id": _last_id(-1),
    "id_2_63": _last_id(2**63),
    "id_true": _last_id(True),
    "logprob_beyond_fp32": _last_logprob(-1e39),
    "logprob_of_400_digits": _last_logprob(-(10**400)),
    "positive_logprob": _last_logprob(0.5),
    "short_length": _short_length,
}
_BODIES: dict[str, Callable[[bytes], bytes]] = {
    "not_json": lambda raw: raw[: len(raw) // 2],
    "number_of_5000_digits": lambda raw: b'{"output_ids": [' + b"9" * 5000 + b"]}",
    "nested": lambda raw: b"[" * 30_000 + b"]" * 30_000,
    "endless": lambda raw: raw + b" " * _LONG,
    "gzip_bomb": lambda raw: gzip.compress(raw + b" " * _LONG, 1),
    "list": lambda raw: b"[" + raw + b"]",
    "null": lambda raw: b"null",
}


def spoil(reply: dict[str, Any], fault: str) -> tuple[bytes, dict[str, str]]:
    """Returns the body of a reply under a fault, or as it should be, and its headers beside the usual ones."""
    if fault in _EDITS:
        _EDITS[fault](reply)
    raw = json.dumps(reply).encode()
    if fault in _BODIES:
        raw = _BODIES[fault](raw)
    return raw, {"Content-Encoding": "gzip"} if fault == "gzip_bomb" else {}

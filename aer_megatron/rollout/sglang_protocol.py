"""What travels between the trainer and an SGLang server: /generate bodies out, checked completions in.

A reply is believed only when it is whole: every token has a finite log-probability and a policy version, and the
counts agree. Anything else is a ``BadReply``: the server is not trusted with further requests.

This file does NOT do any I/O.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from aer_megatron.rollout.engine import GenerateRequest, SamplingOptions
from aer_megatron.types import Completion, FinishReason, VersionSpan

_LOGPROB_ROUNDING = 1e-4  # a log-probability may exceed 0 by its rounding, not by more
_UNVERIFIED = "-unverified"


class BadReply(ValueError):
    """A server's reply that cannot be what the policy sampled; the message says what is wrong with it."""


def version_label(version: int) -> str:
    """Returns the weight version that a server carries while it serves policy ``version``, verified."""
    return str(version)


def unverified_label(version: int) -> str:
    """Returns the weight version of a server between the transfer of ``version`` and its verification."""
    return f"{version}{_UNVERIFIED}"


def generate_body(request: GenerateRequest, options: SamplingOptions, *, rid: str) -> dict[str, Any]:
    """Returns the JSON body of one /generate call.

    The server draws with the request's seed only in its deterministic mode (``--enable-deterministic-inference``).
    """
    return {
        "rid": rid,
        "input_ids": list(request.prompt_ids),
        "sampling_params": {
            "max_new_tokens": request.max_new_tokens,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "top_k": options.top_k or -1,
            "stop_token_ids": sorted(options.stop_token_ids),
            "skip_special_tokens": False,
            "sampling_seed": request.seed & ((1 << 63) - 1),
        },
        "return_logprob": True,
        "logprob_start_len": -1,
        "stream": False,
    }


def parse_json(raw: bytes) -> Any:
    """Returns the decoded body; raises BadReply where it is not JSON."""
    try:
        return json.loads(raw)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadReply(f"the body is not JSON ({error}; {len(raw)} bytes)") from None


def parse_completion(reply: Any, request: GenerateRequest, *, version: int) -> Completion:
    """Returns the completion of a /generate reply that policy ``version`` must have sampled.

    Raises:
        BadReply: something is missing, inconsistent, not finite, or of another policy version.
    """
    meta = _field(reply, "meta_info", Mapping)
    token_ids = tuple(_field(reply, "output_ids", Sequence))
    if not token_ids or not all(isinstance(token, int) and token >= 0 for token in token_ids):
        raise BadReply(f"output_ids {list(token_ids)[:8]} are not token ids")
    if len(token_ids) > request.max_new_tokens:
        raise BadReply(f"{len(token_ids)} tokens were sampled, max_new_tokens is {request.max_new_tokens}")
    count = meta.get("completion_tokens", len(token_ids))
    if count != len(token_ids):
        raise BadReply(f"completion_tokens is {count}, output_ids has {len(token_ids)}")
    spans = _spans(meta, len(token_ids))
    for span in spans:
        if span.version != version:
            raise BadReply(f"tokens {span.start}..{span.end - 1} are of policy version {span.version}, not {version}")
    return Completion(token_ids, _logprobs(meta, token_ids), _finish_reason(meta), spans)


def check_name(reply: Any, rid: str) -> None:
    """Raises BadReply where a reply is of a request of another name: then no abort would have reached it."""
    name = _field(reply, "meta_info", Mapping).get("id")
    if name != rid:
        raise BadReply(f"the reply carries request id {name!r}, not {rid!r}")


def parse_partial(reply: Any, request: GenerateRequest, *, version: int) -> Completion | None:
    """Returns what an aborted request had sampled; None where that is nothing, or nothing to be believed."""
    try:
        return parse_completion(reply, request, version=version)
    except BadReply:
        return None


def rest_of(request: GenerateRequest, so_far: Completion | None) -> GenerateRequest:
    """Returns the request that continues ``so_far``: its tokens go to the server as part of the prompt."""
    if so_far is None:
        return request
    remaining = request.max_new_tokens - len(so_far.token_ids)
    return GenerateRequest(request.prompt_ids + so_far.token_ids, request.seed, remaining)


def join_completions(so_far: Completion | None, more: Completion) -> Completion:
    """Returns ``so_far`` continued by ``more``, every token with its own log-probability and policy version."""
    if so_far is None:
        return more
    shift = len(so_far.token_ids)
    spans = list(so_far.policy_versions)
    for span in more.policy_versions:
        if span.version == spans[-1].version:
            spans[-1] = VersionSpan(span.version, spans[-1].start, span.end + shift)
        else:
            spans.append(VersionSpan(span.version, span.start + shift, span.end + shift))
    return Completion(
        so_far.token_ids + more.token_ids, so_far.logprobs + more.logprobs, more.finish_reason, tuple(spans)
    )


def ended(completion: Completion, request: GenerateRequest, options: SamplingOptions) -> Completion | None:
    """Returns a completion that is whole, None for one that was aborted before its end.

    An abort may arrive with the last token: then the end is that of the token, not of the abort.
    """
    if completion.finish_reason != "abort":
        return completion
    if completion.token_ids[-1] in options.stop_token_ids:
        return replace(completion, finish_reason="stop")
    if len(completion.token_ids) == request.max_new_tokens:
        return replace(completion, finish_reason="length")
    return None


def _field(table: Any, name: str, kind: type) -> Any:
    if not isinstance(table, Mapping) or not isinstance(table.get(name), kind) or isinstance(table[name], str):
        raise BadReply(f"the reply has no {name}")
    return table[name]


def _logprobs(meta: Mapping[str, Any], token_ids: tuple[int, ...]) -> tuple[float, ...]:
    rows = _field(meta, "output_token_logprobs", Sequence)
    if len(rows) != len(token_ids):
        raise BadReply(f"{len(rows)} log-probabilities came for {len(token_ids)} tokens")
    logprobs = []
    for place, (row, token) in enumerate(zip(rows, token_ids, strict=True)):
        if not isinstance(row, Sequence) or len(row) < 2 or row[1] != token:
            raise BadReply(f"log-probability {place} is {row!r}, not one of token {token}")
        value = row[0]
        if not isinstance(value, (int, float)) or not math.isfinite(value) or value > _LOGPROB_ROUNDING:
            raise BadReply(f"log-probability {place} is {value!r}")
        logprobs.append(float(value))
    return tuple(logprobs)


def _finish_reason(meta: Mapping[str, Any]) -> FinishReason:
    kind = _field(meta, "finish_reason", Mapping).get("type")
    if kind not in ("stop", "length", "abort"):
        raise BadReply(f"finish_reason {kind!r} is unknown")
    reason: FinishReason = kind
    return reason


def _spans(meta: Mapping[str, Any], num_tokens: int) -> tuple[VersionSpan, ...]:
    """Returns the version of every token; servers before 0.5.19 name one version for all."""
    if meta.get("weight_versions") is None:
        return (VersionSpan(_version(meta.get("weight_version")), 0, num_tokens),)
    rows = _field(meta, "weight_versions", Sequence)
    spans = []
    reached = 0
    for row in rows:
        if not isinstance(row, Mapping):
            raise BadReply(f"weight_versions {rows} are no table")
        start, end = row.get("start"), row.get("end")
        if start != reached or not isinstance(end, int) or not reached <= end <= num_tokens:
            raise BadReply(f"weight_versions {rows} do not cover the {num_tokens} tokens in order")
        if end > start:
            spans.append(VersionSpan(_version(row.get("version")), start, end))
        reached = end
    if reached != num_tokens:
        raise BadReply(f"weight_versions {rows} do not cover the {num_tokens} tokens in order")
    return tuple(spans)


def _version(label: Any) -> int:
    if not isinstance(label, str) or not (label.isascii() and label.isdigit()):
        raise BadReply(f"the weight version is {label!r}: these weights were never verified")
    return int(label)

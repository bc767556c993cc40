"""What travels between the trainer and an SGLang server: /generate bodies out, checked completions in.

A reply is believed only when it is whole: every token is one of the vocabulary and has a log-probability that fp32 can
have and a policy version of this run, and the counts agree. Anything else is a ``BadReply``: the server is not trusted
with further requests. No reply, whatever it is, raises anything else.

This file does NOT do any I/O.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeGuard, TypeVar

from aer_megatron.rollout.engine import GenerateRequest, SamplingOptions
from aer_megatron.sglang.labels import WeightLabels
from aer_megatron.sglang.replies import BadReply, shown
from aer_megatron.types import Completion, FinishReason, VersionSpan

_LOGPROB_ROUNDING = 1e-4  # a log-probability may exceed 0 by its rounding, not by more
_LOWEST_LOGPROB = -1e4  # fp32 has no probability below exp(-104): what is far below was never sampled
_BASE_BYTES = 1 << 16  # of a /generate reply beside its tokens
_TOKEN_BYTES = 512  # of one token in it: twice its id, its log-probability, its text
_T = TypeVar("_T")


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


def reply_limit(request: GenerateRequest) -> int:
    """Returns how many bytes a /generate reply can have."""
    return _BASE_BYTES + _TOKEN_BYTES * request.max_new_tokens


@dataclass(frozen=True, slots=True)
class Expected:
    """What a /generate reply must agree with."""

    request: GenerateRequest
    version: int  # the policy that must have sampled every token
    labels: WeightLabels
    vocab_size: int


def parse_completion(reply: Any, expected: Expected) -> Completion:
    """Returns the completion of a decoded /generate reply.

    Raises:
        labels.ForeignWeights: another run's weights sampled it.
        BadReply: something is missing, of another type, inconsistent, out of its range, or of another policy version.
    """
    meta = _field(reply, "meta_info", dict)
    token_ids = _token_ids(reply, expected)
    spans = _spans(meta, len(token_ids), expected)
    reason = _finish_reason(meta, token_ids, expected.request.max_new_tokens)
    return Completion(token_ids, _logprobs(meta, token_ids), reason, spans)


def check_name(reply: Any, rid: str) -> None:
    """Raises BadReply where a reply is of a request of another name: then no abort would have reached it."""
    name = _field(reply, "meta_info", dict).get("id")
    if name != rid:
        raise BadReply(f"the reply carries request id {shown(name)}, not {rid!r}")


def parse_partial(reply: Any, expected: Expected) -> Completion | None:
    """Returns what an aborted request had sampled; None where that is nothing, or nothing to be believed."""
    try:
        return parse_completion(reply, expected)
    except BadReply:
        return None


def is_empty_abort(reply: Any) -> bool:
    """Returns whether a request was aborted on the server before its first token."""
    try:
        reason = _field(_field(reply, "meta_info", dict), "finish_reason", dict)
        return reason.get("type") == "abort" and not _field(reply, "output_ids", list)
    except BadReply:
        return False


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


def _field(table: Any, name: str, kind: type[_T]) -> _T:
    value = table.get(name) if isinstance(table, Mapping) else None
    if not isinstance(value, kind):
        raise BadReply(f"the reply has no {name}")
    return value


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _token_ids(reply: Any, expected: Expected) -> tuple[int, ...]:
    limit, size = expected.request.max_new_tokens, expected.vocab_size
    ids = _field(reply, "output_ids", list)
    if not ids or len(ids) > limit:
        raise BadReply(f"{len(ids)} tokens were sampled, max_new_tokens is {limit}")
    for position, token in enumerate(ids):
        if not _is_int(token) or not 0 <= token < size:
            raise BadReply(f"token {position} is {shown(token)}, not an id of the {size} of the vocabulary")
    count = _field(reply, "meta_info", dict).get("completion_tokens", len(ids))
    if not _is_int(count) or count != len(ids):
        raise BadReply(f"completion_tokens is {shown(count)}, output_ids has {len(ids)}")
    return tuple(ids)


def _logprobs(meta: Mapping[str, Any], token_ids: tuple[int, ...]) -> tuple[float, ...]:
    rows = _field(meta, "output_token_logprobs", list)
    if len(rows) != len(token_ids):
        raise BadReply(f"{len(rows)} log-probabilities came for {len(token_ids)} tokens")
    logprobs = []
    for position, (row, token) in enumerate(zip(rows, token_ids, strict=True)):
        if not isinstance(row, list) or len(row) < 2 or not _is_int(row[1]) or row[1] != token:
            raise BadReply(f"log-probability {position} is {shown(row)}, not one of token {token}")
        value = row[0]
        # NaN is in no range; an integer of any length is compared as it is
        if not (_is_int(value) or isinstance(value, float)) or not _LOWEST_LOGPROB <= value <= _LOGPROB_ROUNDING:
            raise BadReply(f"log-probability {position} is {shown(value)}")
        logprobs.append(float(value))
    return tuple(logprobs)


def _finish_reason(meta: Mapping[str, Any], token_ids: tuple[int, ...], limit: int) -> FinishReason:
    table = _field(meta, "finish_reason", dict)
    match table.get("type"):
        case "length":
            if len(token_ids) < limit:
                raise BadReply(
                    f"finish_reason is 'length' after {len(token_ids)} of {limit} tokens: prompt and answer must fit "
                    "into the server's context_length and max_total_tokens"
                )
            return "length"
        case "stop":
            matched = table.get("matched")
            if matched is not None and not (_is_int(matched) and matched == token_ids[-1]):
                raise BadReply(f"finish_reason is 'stop' at {shown(matched)}, the last token is {token_ids[-1]}")
            return "stop"
        case "abort":
            return "abort"
        case kind:
            raise BadReply(f"finish_reason {shown(kind)} is unknown")


def _spans(meta: Mapping[str, Any], num_tokens: int, expected: Expected) -> tuple[VersionSpan, ...]:
    """Returns the version of every token; servers before 0.5.19 name one version for all."""
    if meta.get("weight_versions") is None:
        return (_span(meta.get("weight_version"), 0, num_tokens, expected),)
    rows = _field(meta, "weight_versions", list)
    spans = []
    reached = 0
    for row in rows:
        if not isinstance(row, Mapping):
            raise BadReply("weight_versions are no table")
        start, end = row.get("start"), row.get("end")
        if not _is_int(start) or not _is_int(end) or start != reached or not reached <= end <= num_tokens:
            raise BadReply(f"weight_versions do not cover the {num_tokens} tokens in order")
        if end > start:
            spans.append(_span(row.get("version"), start, end, expected))
        reached = end
    if reached != num_tokens:
        raise BadReply(f"weight_versions do not cover the {num_tokens} tokens in order")
    return tuple(spans)


def _span(label: Any, start: int, end: int, expected: Expected) -> VersionSpan:
    version = expected.labels.version_of(label)
    if version != expected.version:
        raise BadReply(f"tokens {start}..{end - 1} are of policy version {version}, not {expected.version}")
    return VersionSpan(version, start, end)

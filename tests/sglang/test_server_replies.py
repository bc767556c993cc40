"""Whatever a server answers is a completion to be believed or a BadReply; whatever it reports of itself is data."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from aer_megatron.rollout.engine import GenerateRequest
from aer_megatron.sglang.labels import WeightLabels
from aer_megatron.sglang.protocol import (
    Expected,
    check_name,
    is_empty_abort,
    parse_completion,
    parse_partial,
)
from aer_megatron.sglang.replies import BadReply, Reply, parse_json, printable, shown
from aer_megatron.sglang.served_weights import by_rank, first_difference, holds_fp8

RUN = "aer-0123456789abcdef"
EXPECTED = Expected(GenerateRequest((4, 1), 0, 4), 5, WeightLabels(RUN), vocab_size=10)
REPLY = {
    "output_ids": [9, 7, 0, 2],
    "meta_info": {
        "id": "r",
        "finish_reason": {"type": "length", "length": 4},
        "completion_tokens": 4,
        "weight_version": f"{RUN}/5",
        "weight_versions": [
            {"version": f"{RUN}/5", "start": 0, "end": 2},
            {"version": f"{RUN}/5", "start": 2, "end": 4},
        ],
        "output_token_logprobs": [[-0.5, 9, None], [-1.5, 7, None], [0.0, 0, None], [-3, 2, None]],
    },
}

numbers = st.one_of(
    st.integers(), st.integers(-(10**400), 10**400), st.floats(), st.sampled_from([2**63, 10, -1, True, False, 1e39])
)
scalars = st.one_of(st.none(), numbers, st.text(max_size=8), st.sampled_from([f"{RUN}/5", f"{RUN}/4", "stop", "abort"]))
keys = st.sampled_from(["output_ids", "meta_info", "finish_reason", "type", "output_token_logprobs", "checksums", "0"])
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4), max_leaves=12
)


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Returns the path of every value of a JSON tree but the root."""
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path_of for key, value in inner for path_of in [(*path, key), *places(value, (*path, key))]]


@st.composite
def spoiled_replies(draw: st.DrawFn) -> Any:
    """A right reply in which up to three values are replaced or left out."""
    reply = copy.deepcopy(REPLY)
    for _ in range(draw(st.integers(0, 3))):
        found = places(reply)
        if not found:
            break
        *path, last = draw(st.sampled_from(found))
        node: Any = reply
        for key in path:
            node = node[key]
        if draw(st.booleans()):
            node[last] = draw(values)
        else:
            del node[last]
    return reply


def check_believed(reply: Any) -> bool:
    """Returns whether a reply is believed, and checks what is then known of it."""
    try:
        completion = parse_completion(reply, EXPECTED)
    except BadReply as error:
        assert len(str(error)) < 1000 and str(error).isprintable()
        return False
    assert 1 <= len(completion.token_ids) <= 4 and len(completion.logprobs) == len(completion.token_ids)
    assert all(type(token) is int and 0 <= token < 10 for token in completion.token_ids)
    assert all(type(value) is float and -1e4 <= value <= 1e-4 for value in completion.logprobs)
    assert [span.version for span in completion.policy_versions] == [5] * len(completion.policy_versions)
    assert completion.policy_versions[-1].end == len(completion.token_ids)
    assert completion.finish_reason != "length" or len(completion.token_ids) == 4
    return True


def test_the_reply_that_is_spoiled_is_right_at_first() -> None:
    assert check_believed(REPLY)


@given(st.one_of(spoiled_replies(), values))
def test_a_reply_is_a_completion_or_a_bad_reply(reply: Any) -> None:
    believed = check_believed(reply)
    assert (parse_partial(reply, EXPECTED) is not None) == believed
    assert not (believed and is_empty_abort(reply))
    try:
        check_name(reply, "r")
    except BadReply:
        return


@given(st.one_of(st.binary(max_size=60), values.map(lambda value: json.dumps(value).encode())))
def test_bytes_are_json_or_a_bad_reply_and_their_message_is_one_short_line(raw: bytes) -> None:
    reply = Reply(500, raw, None)
    assert reply.text.isprintable() and len(reply.text) <= 500
    try:
        value = parse_json(raw)
    except BadReply:
        assert reply.json() is None
        return
    assert len(shown(value)) < 200 and shown(value).isprintable()


@given(st.text())
def test_a_server_s_words_are_printable(text: str) -> None:
    assert printable(text).isprintable()


@given(values, st.booleans())
def test_a_report_of_checksums_is_compared_whatever_it_is(reported: Any, names_only: bool) -> None:
    rows = [{"checksums": reported, "parallelism_info": [reported]}, {"checksums": {"a": reported}}]
    for report in (reported, [reported], rows, [{"checksums": {"a": "1"}, "parallelism_info": reported}]):
        assert isinstance(first_difference([{"a": "1", "b": "2"}], report, names_only=names_only), str)
        assert holds_fp8(report) in (True, False, None)
        assert isinstance(by_rank(report), list)

"""What is sent to /generate, what is believed of its reply, and what the run file must say."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from aer_megatron.rollout.engine import GenerateRequest, SamplingOptions
from aer_megatron.sglang.labels import ForeignWeights, WeightLabels
from aer_megatron.sglang.protocol import (
    Expected,
    ended,
    generate_body,
    is_empty_abort,
    join_completions,
    parse_completion,
    parse_partial,
    rest_of,
)
from aer_megatron.sglang.replies import BadReply, parse_json
from aer_megatron.types import Completion, VersionSpan
from tests.support.policies import policy_config

REQUEST = GenerateRequest((4, 1), (1 << 64) - 1, 4)
RUN, OTHER = "aer-0123456789abcdef", "aer-fedcba9876543210"
EXPECTED = Expected(REQUEST, 5, WeightLabels(RUN), vocab_size=10)
REPLY: dict[str, Any] = {
    "output_ids": [9, 7, 2],
    "meta_info": {
        "finish_reason": {"type": "stop", "matched": 2},
        "completion_tokens": 3,
        "weight_version": f"{RUN}/5",
        "weight_versions": [{"version": f"{RUN}/5", "start": 0, "end": 3}],
        "output_token_logprobs": [[-0.5, 9, None], [-1.5, 7, None], [0.0, 2, None]],
    },
}


def test_a_request_carries_the_sampling_options() -> None:
    body = generate_body(REQUEST, SamplingOptions(0.7, 0.9, 0, frozenset({2, 1})), rid="r")
    assert (body["rid"], body["input_ids"], body["return_logprob"]) == ("r", [4, 1], True)
    params = body["sampling_params"]
    assert (params["temperature"], params["top_p"], params["top_k"]) == (0.7, 0.9, -1)
    assert (params["max_new_tokens"], params["stop_token_ids"]) == (4, [1, 2])
    greedy = generate_body(REQUEST, SamplingOptions(0.0, 1.0, 0, frozenset()), rid="r")["sampling_params"]
    assert (greedy["temperature"], greedy["top_p"], greedy["top_k"]) == (0.0, 1.0, -1)  # below 1e-6 the server's argmax
    assert params["sampling_seed"] == (1 << 63) - 1  # the server takes signed 64-bit numbers


def test_a_whole_reply_is_a_completion() -> None:
    expected = Completion((9, 7, 2), (-0.5, -1.5, 0.0), "stop", (VersionSpan(5, 0, 3),))
    assert parse_completion(REPLY, EXPECTED) == expected
    old = copy.deepcopy(REPLY)
    del old["meta_info"]["weight_versions"]  # before 0.5.19
    assert parse_completion(old, EXPECTED) == expected


def edit(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def apply(reply: dict[str, Any]) -> None:
        node: Any = reply
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value

    return apply


SPANS = ("meta_info", "weight_versions")
LOGPROBS = ("meta_info", "output_token_logprobs")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edit("output_ids", value=[]), "0 tokens were sampled"),
        (edit("output_ids", value=[9, 7, 2, 3, 3]), "max_new_tokens is 4"),
        (edit("output_ids", value="972"), "no output_ids"),
        *[
            (edit("output_ids", value=[9, token, 2]), "token 1 is .*not an id of the 10")
            for token in (-7, 10, 2**63, 10**3000, True, 7.0, "7", None, [7], {})
        ],
        (edit("meta_info", value=None), "no meta_info"),
        (edit("meta_info", "completion_tokens", value=2), "completion_tokens is 2"),
        (edit("meta_info", "completion_tokens", value=3.0), r"completion_tokens is 3\.0"),
        (edit(*LOGPROBS, value=None), "no output_token_logprobs"),
        (edit(*LOGPROBS, value="abc"), "no output_token_logprobs"),
        (edit(*LOGPROBS, 1, value={"0": -1.5, "1": 7}), "log-probability 1 is a table of 2"),
        *[
            (edit(*LOGPROBS, 1, 0, value=value), "log-probability 1 is ")
            for value in (None, float("nan"), float("inf"), -float("inf"), 0.3, -1e39, -1e5, -(10**400), 10**400)
        ],
        *[(edit(*LOGPROBS, 1, 0, value=value), "log-probability 1 is ") for value in (True, False, "-1", [], {})],
        *[(edit(*LOGPROBS, 1, 1, value=token), "not one of token 7") for token in (8, 7.0, "7", None)],
        (edit("meta_info", "finish_reason", value=None), "no finish_reason"),
        (edit("meta_info", "finish_reason", value="stop"), "no finish_reason"),
        (edit("meta_info", "finish_reason", "type", value="odd"), "finish_reason 'odd'"),
        (edit("meta_info", "finish_reason", "type", value={}), "finish_reason a table of 0"),
        (edit("meta_info", "finish_reason", "matched", value=7), "'stop' at 7, the last token is 2"),
        (edit("meta_info", "finish_reason", "matched", value="NaN happened"), "'stop' at 'NaN happened'"),
        (edit("meta_info", "finish_reason", value={"type": "length", "length": 3}), "'length' after 3 of 4 tokens"),
        (edit(*SPANS, 0, "version", value=f"{RUN}/4"), "policy version 4, not 5"),
        (edit(*SPANS, 0, "version", value=f"{OTHER}/5"), f"'{OTHER}/5', weights of another run"),
        (edit(*SPANS, 0, "version", value=f"{OTHER}/5-unverified"), "weights of another run"),
        *[
            (edit(*SPANS, 0, "version", value=label), "never verified")
            for label in (f"{RUN}/5-unverified", "default", "5", 5, None, [], f"{RUN}/" + "9" * 5000, f"{RUN}/\u0665")
        ],
        (edit(*SPANS, 0, "end", value=2), "do not cover"),
        (edit(*SPANS, 0, "end", value=3.0), "do not cover"),
        (edit(*SPANS, 0, "start", value=1), "do not cover"),
        (edit(*SPANS, 0, "start", value=False), "do not cover"),
        (edit(*SPANS, value=[7]), "are no table"),
        (edit(*SPANS, value=[]), "do not cover"),
    ],
)
def test_a_damaged_reply_is_not_believed(damage: Callable[[dict[str, Any]], None], message: str) -> None:
    reply = copy.deepcopy(REPLY)
    damage(reply)
    with pytest.raises(BadReply, match=message):
        parse_completion(reply, EXPECTED)


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"<html>", b"\xff\xfe", b"[" * 200_000, b'{"a":' * 200_000, b"[" + b"9" * 5000 + b"]"]
)
def test_what_is_not_json_is_not_believed(raw: bytes) -> None:
    with pytest.raises(BadReply, match="not JSON"):
        parse_json(raw)


def test_labels_tell_one_run_from_another_and_from_everything_else() -> None:
    labels = WeightLabels(RUN)
    assert labels.version_of(labels.verified(7)) == 7
    for label in (f"{OTHER}/7", f"{OTHER}/7-unverified"):
        assert labels.is_foreign(label)
        with pytest.raises(ForeignWeights, match="give each run servers of its own"):
            labels.version_of(label)
    for label in (labels.verified(7), labels.unverified(7), "default", "7", None, 7, f"x{OTHER}/7", f"{OTHER}/7\n"):
        assert not labels.is_foreign(label)


def test_an_abort_before_the_first_token_is_told_from_garbage() -> None:
    aborted = {"output_ids": [], "meta_info": {"finish_reason": {"type": "abort", "message": "Abort"}}}
    assert is_empty_abort(aborted)
    for other in (REPLY, None, [], {}, aborted | {"output_ids": [1]}, aborted | {"meta_info": {"finish_reason": []}}):
        assert not is_empty_abort(other)


def test_the_run_file_says_where_the_servers_are() -> None:
    launched = policy_config(rollout={"engine": "sglang"}, sglang={"num_servers": 2, "launch": {"tp_size": 2}})
    assert launched.sglang.launch == {"tp_size": 2}
    policy_config(rollout={"engine": "sglang"}, sglang={"urls": ["http://h:1"]})
    for sglang in ({}, {"num_servers": 1, "urls": ["http://h:1"]}):
        with pytest.raises(ValueError, match=r"needs exactly one of them"):
            policy_config(rollout={"engine": "sglang"}, sglang=sglang)


def partial(tokens: tuple[int, ...], reason: str, *spans: VersionSpan) -> Completion:
    return Completion(tokens, tuple(-0.1 * token for token in tokens), reason, spans)  # type: ignore[arg-type]


def test_a_request_goes_on_behind_its_own_tokens() -> None:
    assert rest_of(REQUEST, None) is REQUEST
    first = partial((9, 7), "abort", VersionSpan(5, 0, 2))
    assert rest_of(REQUEST, first) == GenerateRequest((4, 1, 9, 7), REQUEST.seed, 2)
    second = partial((6, 2), "stop", VersionSpan(6, 0, 1), VersionSpan(7, 1, 2))
    whole = join_completions(first, second)
    spans = (VersionSpan(5, 0, 2), VersionSpan(6, 2, 3), VersionSpan(7, 3, 4))
    assert whole == partial((9, 7, 6, 2), "stop", *spans)
    assert join_completions(None, second) is second
    # a server lost without a transfer between the parts: one version, one span
    same = join_completions(first, partial((6,), "length", VersionSpan(5, 0, 1)))
    assert same.policy_versions == (VersionSpan(5, 0, 3),)


def test_an_abort_that_came_with_the_last_token_is_an_end() -> None:
    options = SamplingOptions(1.0, 1.0, 0, frozenset({2}))
    span = VersionSpan(0, 0, 1)
    assert ended(partial((9,), "abort", span), REQUEST, options) is None
    stopped = ended(partial((9, 2), "abort", span), REQUEST, options)
    full = ended(partial((9, 7, 5, 5), "abort", span), REQUEST, options)
    assert stopped is not None and stopped.finish_reason == "stop"
    assert full is not None and full.finish_reason == "length"
    done = partial((9,), "stop", span)
    assert ended(done, REQUEST, options) is done


def test_an_aborted_reply_is_believed_as_far_as_it_is_whole() -> None:
    reply = copy.deepcopy(REPLY)
    reply["meta_info"]["finish_reason"] = {"type": "abort", "message": "Abort"}
    expected = Completion((9, 7, 2), (-0.5, -1.5, 0.0), "abort", (VersionSpan(5, 0, 3),))
    assert parse_partial(reply, EXPECTED) == expected
    assert parse_partial(reply, replace(EXPECTED, version=4)) is None
    nothing = {"output_ids": [], "meta_info": {"finish_reason": {"type": "abort"}}}
    assert parse_partial(nothing, EXPECTED) is None
    assert parse_partial(None, EXPECTED) is None

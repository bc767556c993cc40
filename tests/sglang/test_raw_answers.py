"""Answers that are hardly HTTP: each is over in time and memory, named, and costs only the server that gave it."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from aer_megatron.sglang.fleet import ServerFleet
from aer_megatron.sglang.http_loop import ClientOptions
from tests.support.raw_server import answering, repeats, says
from tests.support.sglang_double import SGLangDouble
from tests.support.sglang_fixtures import OPTIONS, requests, rollouts, weights

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
ANSWERS = {
    "not HTTP": says(b"\x16\x03\x01 garbage " * 1000),
    "endless status line": repeats(b"HTTP/1.1 200 ", b"x" * 65536),
    "endless headers": repeats(OK, b"X-A: 1\r\n" * 4096),
    "an endless header": repeats(OK + b"X-A: ", b"1" * 65536),
    "endless interim answers": repeats(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "endless body": repeats(OK + b"\r\n", b" " * 65536),
    "a body of 2^63 bytes": repeats(OK + b"Content-Length: 9223372036854775807\r\n\r\n", b" " * 65536),
    "a length of 5,000 digits": says(OK + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n"),
    "a negative length": says(OK + b"Content-Length: -1\r\n\r\n{}"),
    "endless chunks": repeats(CHUNKED, b"10\r\n                \r\n" * 1000),
    "a chunk of 2^64 bytes": repeats(CHUNKED + b"FFFFFFFFFFFFFFFF\r\n", b" " * 65536),
    "an endless chunk size": repeats(CHUNKED, b"0" * 65536),
    "endless trailers": repeats(CHUNKED + b"0\r\n", b"X-A: 1\r\n" * 4096),
    "a body that drips": repeats(OK + b"Content-Length: 60000\r\n\r\n", b" ", pause_s=0.1),
    "headers that drip": repeats(OK, b"X: 1\r\n", pause_s=0.1),
    "nothing": says(b""),
}


@pytest.fixture
def few_mb() -> Iterator[None]:
    """Fails a test that needs much memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150 * 1024  # kB


@pytest.mark.parametrize("kind", ANSWERS)
def test_an_answer_to_a_request(kind: str, folder: Path, few_mb: None) -> None:
    with (
        SGLangDouble(folder) as good,
        answering(ANSWERS[kind]) as url,
        rollouts([good.url], folder, request_timeout_s=1.0, max_failures=1) as made,
    ):
        made.sync.publish(iter(weights(0).items()), 0)
        bad = type(made.fleet.servers[0])(1, url, in_service=True)
        made.fleet.servers.append(bad)  # as a server that took the weights and then went wrong
        began = time.monotonic()
        assert len(made.engine.generate(requests(12), OPTIONS)) == 12
        assert time.monotonic() - began < 30
        assert not bad.in_service and bad.reason.isprintable() and len(bad.reason) < 1000
        assert made.fleet.servers[0].in_service
        made.fleet.servers.remove(bad)


@pytest.mark.parametrize("kind", ANSWERS)
def test_an_answer_to_a_control_call(kind: str, few_mb: None) -> None:
    limits = ClientOptions(max_concurrency=1, connect_timeout_s=1.0, control_timeout_s=1.0, api_key="sesame")
    with answering(ANSWERS[kind]) as url, ServerFleet([url], limits) as fleet:
        began = time.monotonic()
        with pytest.raises(RuntimeError, match=r"server 0 \(http.*: /server_info failed: ") as failed:
            fleet.control(0, "/server_info")
        assert time.monotonic() - began < 20
        assert str(failed.value).isprintable() and len(str(failed.value)) < 1000 and "sesame" not in str(failed.value)

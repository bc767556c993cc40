"""A server that says of itself what cannot be is refused with its words; the others take the weights and serve."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from aer_megatron.sglang.transports import TRANSPORTS
from tests.support.sglang_double import SGLangDouble
from tests.support.sglang_fixtures import OPTIONS, requests, rollouts, weights

PARAMETER = "model.norm.weight"


class Liar(SGLangDouble):
    """Answers ``path`` with ``body``, and every other call as it should."""

    path = ""
    body = b""
    status = 200

    @web.middleware
    async def _authorize(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if request.path == self.path:
            return web.Response(body=self.body, status=self.status, content_type="application/json")
        response: web.StreamResponse = await handler(request)
        return response


def publish_past(folder: Path, path: str, body: bytes, status: int = 200, transport: str = "disk") -> str:
    """Returns why a liar does not serve; a healthy server beside it must."""
    with (
        Liar(folder) as bad,
        SGLangDouble(folder) as good,
        rollouts([bad.url, good.url], folder, transport=transport) as made,
    ):
        bad.path, bad.body, bad.status = path, body, status
        made.sync.publish(iter(weights(0).items()), 0)
        assert made.fleet.in_service() == [1]
        assert len(made.engine.generate(requests(4), OPTIONS)) == 4
        return made.fleet.servers[0].reason


SIZES = ["abc", -1, 0, 10**9, 200_000, 3, True, 1.0, [], {}, "1", 10**4000]


@pytest.mark.parametrize("size", SIZES, ids=[str(place) for place in range(len(SIZES))])
def test_a_tensor_parallel_size_that_no_server_of_the_model_has(size: Any, folder: Path) -> None:
    began = time.monotonic()
    reason = publish_past(folder, "/server_info", json.dumps({"tp_size": size, "device": "cpu"}).encode())
    assert "it reports tp_size" in reason and "must divide the model's 4 heads" in reason and len(reason) < 200
    assert time.monotonic() - began < 60


BODIES = {
    "empty": b"",
    "garbage": b"<html>",
    "null": b"null",
    "list": b"[1, 2]",
    "nested": b"[" * 100_000 + b"]" * 100_000,
    "digits": b'{"tp_size": ' + b"9" * 10_000 + b"}",
    "long": b'{"tp_size": 1, "device": "' + b"x" * (20 << 20) + b'"}',
    "escapes": json.dumps({"success": False, "message": "\x1b[2J\n\x00\ud800" + "m" * 10**5}).encode(),
    "deep message": b'{"success": false, "message": ' + b"[" * 900 + b"]" * 900 + b"}",
}


@pytest.mark.parametrize("path", ["/server_info", "/model_info", "/weights_checker", "/update_weights_from_disk"])
@pytest.mark.parametrize("kind", BODIES)
def test_a_body_that_cannot_be(kind: str, path: str, folder: Path) -> None:
    if path == "/model_info" and kind == "escapes":
        pytest.skip("success is not asked of it")
    reason = publish_past(folder, path, BODIES[kind])
    assert path in reason and len(reason) < 1000 and reason.isprintable()


REPORTS = {
    "no ranks": {},
    "ranks of another type": {"ranks": 7},
    "rows of another type": {"ranks": [7, None, "x", [], {}]},
    "no checksums": {"ranks": [{"checksums": None}]},
    "checksums of another type": {"ranks": [{"checksums": {PARAMETER: 7}}]},
    "places of another type": {"ranks": [{"checksums": {PARAMETER: "00"}, "parallelism_info": [7]}]},
    "an empty place": {"ranks": [{"checksums": {PARAMETER: "00"}, "parallelism_info": []}]},
    "a rank by name": {"ranks": [{"checksums": {PARAMETER: "00"}, "parallelism_info": [{"tp_rank": "abc"}]}]},
    "a rank that is not": {"ranks": [{"checksums": {PARAMETER: "00"}, "parallelism_info": [{"tp_rank": -1}]}]},
    "a rank of many digits": {"ranks": [{"checksums": {PARAMETER: "00"}, "parallelism_info": [{"tp_rank": 10**400}]}]},
    "a long name": {"ranks": [{"checksums": {"norm" * 10**5: "00"}}]},
    "a long checksum": {"ranks": [{"checksums": {PARAMETER: "0" * 10**6}}]},
}


@pytest.mark.parametrize("kind", REPORTS)
def test_a_report_of_checksums_that_cannot_be(kind: str, folder: Path) -> None:
    reason = publish_past(folder, "/weights_checker", json.dumps({"success": True} | REPORTS[kind]).encode())
    assert reason.startswith("what it holds is not what was sent: ") and len(reason) < 500


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_redirect_of_a_control_call_is_not_followed(transport: str, folder: Path) -> None:
    assert "/weights_checker answers 307" in publish_past(folder, "/weights_checker", b"{}", 307, transport)

"""The script that waits for servers asks the given address alone, and no answer keeps it."""

from __future__ import annotations

import runpy
import socket
import time
from collections.abc import Callable

import pytest

from tests.support.raw_server import answering, repeats, says
from tests.support.runs import ROOT

SCRIPT = runpy.run_path(str(ROOT / "examples" / "multinode_torchrun" / "await_servers.py"))
is_healthy: Callable[[str], bool] = SCRIPT["is_healthy"]
main: Callable[[list[str]], int] = SCRIPT["main"]


def test_a_healthy_server_is_healthy_whatever_proxy_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for host in ("127.0.0.1", "::1"):
        with answering(says(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"), host) as url:
            assert is_healthy(url) and is_healthy(f"{url}/")
            assert main(["5", url]) == 0


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 503 Service Unavailable\r\n\r\n",
        b"HTTP/1.1 2000\r\n\r\n"[:11],
        b"garbage " * 10_000,
        b"",
        b"HTTP/1.1 20",
        b"200 OK 200 OK 200 OK",
    ],
)
def test_anything_else_is_not(answer: bytes) -> None:
    with answering(says(answer)) as url:
        assert not is_healthy(url)


def test_a_redirect_is_not_followed() -> None:
    asked: list[bool] = []

    def other(peer: socket.socket) -> None:
        asked.append(True)
        peer.sendall(b"HTTP/1.1 200 OK\r\n\r\n")

    with answering(other) as target:
        location = f"Location: {target}/health\r\n"
        with answering(says(f"HTTP/1.1 307 Go\r\n{location}\r\n".encode())) as url:
            assert not is_healthy(url)
    assert asked == []


def test_an_answer_that_drips_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(is_healthy.__globals__, "_CALL_S", 0.5)

    with answering(repeats(b"HTTP/1", b".", pause_s=0.3)) as url:
        began = time.monotonic()
        assert not is_healthy(url)
        assert time.monotonic() - began < 3


@pytest.mark.parametrize("url", ["localhost:1", "ftp://127.0.0.1", "http://", "http://h:99999999", "http://[::1"])
def test_what_is_no_address_is_refused(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["1", url]) == 2
    assert "await_servers: " in capsys.readouterr().err


def test_a_host_that_does_not_exist_is_said_when_the_time_is_over(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["0", "http://no-such-host.invalid:1"]) == 1
    assert "no-such-host.invalid:1 is not healthy after 0 s" in capsys.readouterr().err

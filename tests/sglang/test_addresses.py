"""Addresses that are none are refused by the option's name; ports and this machine's own hosts are the run's."""

from __future__ import annotations

import resource
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from aer_megatron.sglang.addresses import (
    HeldPort,
    allow_open_files,
    check_resolves,
    in_url,
    is_loopback,
    server_url,
    without_proxies,
)
from aer_megatron.sglang.fleet import ServerFleet
from aer_megatron.sglang.http_loop import ClientOptions
from tests.support.sglang_double import SGLangDouble
from tests.support.sglang_fixtures import OPTIONS, requests, rollouts, weights

LIMITS = ClientOptions(max_concurrency=1, connect_timeout_s=1.0, control_timeout_s=1.0, api_key=None)


@pytest.mark.parametrize(
    "url",
    [
        "", "127.0.0.1:30000", "http://", "http://:30000", "ftp://h:1", "http://h:99999", "http://h:x", "http://h:0",
        "http://::1:30000", "http://[::1", "http://u:secret@h:1", "http://h:1/?a=b", "http://h:1#x",
    ],
)  # fmt: skip
def test_what_is_no_address_is_refused_by_the_option_s_name(url: str) -> None:
    with pytest.raises(ValueError, match=r"^sglang\.urls: ") as refused:
        server_url("sglang.urls", url)
    assert "secret" not in str(refused.value)


def test_an_address_is_taken_as_it_is() -> None:
    for url in ("http://h:1", "https://h", "http://[::1]:30000", "http://10.0.0.7:30000/prefix"):
        assert server_url("sglang.urls", f"{url}/") == url


def test_a_host_that_does_not_exist_is_named_at_the_start() -> None:
    for host in ("no-such-host.invalid", "a" * 80 + ".invalid", "-\u00df..x"):
        with pytest.raises(ValueError, match=r"sglang\.urls: the host '.*does not resolve"):
            ServerFleet([f"http://{host}:1"], LIMITS)
    with pytest.raises(ValueError, match="names a server twice"):
        ServerFleet(["http://127.0.0.1:1", "http://127.0.0.1:1/"], LIMITS)
    with (
        ServerFleet(["http://127.0.0.1:1"], LIMITS) as fleet,
        pytest.raises(ValueError, match=r"sglang\.router_url: the host 'no-such-host\.invalid'"),
    ):
        fleet.route_through("http://no-such-host.invalid:1")


def test_a_resolver_that_is_away_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", away)
    check_resolves("sglang.urls", "http://node2:30000")


def test_hosts_in_addresses() -> None:
    assert [in_url(host) for host in ("::1", "[::1]", "127.0.0.1", "node2")] == ["[::1]", "[::1]", "127.0.0.1", "node2"]
    assert [is_loopback(host) for host in ("::1", "127.3.0.1", "localhost")] == [True] * 3
    assert [is_loopback(host) for host in ("0.0.0.0", "10.0.0.7", "node2", "::", "")] == [False] * 5


def test_a_server_on_ipv6_is_reached(folder: Path) -> None:
    with SGLangDouble(folder, host="::1") as server, rollouts([server.url], folder) as made:
        assert server.url.startswith("http://[::1]:")
        made.sync.publish(iter(weights(0).items()), 0)
        assert len(made.engine.generate(requests(3), OPTIONS)) == 3


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_a_held_port_is_given_to_nobody_and_a_server_can_listen_on_it(host: str) -> None:
    held = HeldPort(host)
    others = [HeldPort(host) for _ in range(200)]
    assert len({held.number, *(other.number for other in others)}) == 201
    family = socket.AF_INET6 if host == "::1" else socket.AF_INET
    address = ("::1" if host == "::1" else "127.0.0.1", held.number)
    with socket.socket(family) as probe:
        assert probe.connect_ex(address) != 0  # nobody listens
    for _ in range(2):  # a server, and the one that is started after it
        with socket.socket(family) as server, socket.socket(family) as client:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(address)
            server.listen()
            client.connect(address)
    for port in (held, *others):
        port.release()


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid", "not a host"])
def test_a_host_that_is_not_this_machine_s_is_refused_by_the_option_s_name(host: str) -> None:
    with pytest.raises(ValueError, match=rf"sglang\.host='{host}' is no address"):
        HeldPort(host)


def test_own_hosts_are_asked_without_the_proxies_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    made = without_proxies({"http_proxy": "http://127.0.0.1:9", "NO_PROXY": "a.example, b"}, ["10.0.0.7", "fd00::7"])
    assert made["no_proxy"] == made["NO_PROXY"] and made["http_proxy"] == "http://127.0.0.1:9"
    for name, value in made.items():
        monkeypatch.setenv(name, value)
    exempt = ("127.0.0.1:3", "localhost:3", "[::1]:3", "10.0.0.7:3", "[fd00::7]:3", "x.a.example", "b")
    assert all(urllib.request.proxy_bypass(host) for host in exempt)
    assert not urllib.request.proxy_bypass("example.com")


@pytest.fixture
def few_files() -> Iterator[int]:
    """A soft limit that is near; what the test raised is taken back."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_soft_limit_of_open_files_is_raised_to_what_is_needed(
    few_files: int, caplog: pytest.LogCaptureFixture
) -> None:
    hard = few_files
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    allow_open_files(300)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (300, hard)
    allow_open_files(200)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (300, hard)
    assert not caplog.records
    if hard != resource.RLIM_INFINITY:
        allow_open_files(hard + 1)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
        assert "lower sglang.max_concurrency" in caplog.text


NO_FILES_LEFT = """
import os, resource, sys
from pathlib import Path
from tests.support.sglang_fixtures import OPTIONS, requests, rollouts, weights
url, folder = sys.argv[1], Path(sys.argv[2])
with rollouts([url], folder, max_attempts=2, max_concurrency=64) as made:
    made.sync.publish(iter(weights(0).items()), 0)
    made.engine.generate(requests(1), OPTIONS)
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 2, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    try:
        made.engine.generate(requests(64), OPTIONS)
        print("no error")
    except RuntimeError as error:
        print(error)
    print(made.fleet.describe())
    print(len(made.engine.generate(requests(1), OPTIONS)))
"""


@pytest.mark.processes
def test_no_file_descriptors_left_is_this_process_s_fault_and_not_the_server_s(folder: Path) -> None:
    with SGLangDouble(folder, token_s=0.1) as server:
        command = [sys.executable, "-c", NO_FILES_LEFT, server.url, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    said, state, count = done.stdout.splitlines() or [done.stderr, "", ""]
    assert "this process may open no further connection" in said and "ulimit -n" in said
    assert state.endswith("in service") and count == "1"
    assert "out of service" not in done.stderr

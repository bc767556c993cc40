"""Generation through a router: spread, repeated, kept away from servers out of service; what it breaks is named."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from aer_megatron.rollout.engine import GenerateRequest, SamplingOptions
from aer_megatron.sglang.fleet import ServerFleet
from aer_megatron.sglang.http_loop import ClientOptions
from aer_megatron.sglang.router import Router
from aer_megatron.types import Completion
from tests.support.raw_server import answering
from tests.support.sglang_double import SGLangDouble
from tests.support.sglang_fixtures import Rollouts, requests, rollouts, weights
from tests.support.sglang_router_double import RouterDouble, kill, set_pace

NO_STOP = SamplingOptions(1.0, 1.0, 0, frozenset())
NUM_REQUESTS = 24
LONG = 400  # tokens, 20 s at the slow pace
SLOW_S = 0.05

Pair = tuple[SGLangDouble, SGLangDouble]


@pytest.fixture
def pair(folder: Path) -> Iterator[Pair]:
    with SGLangDouble(folder, token_s=0.002) as first, SGLangDouble(folder, token_s=0.002) as second:
        yield first, second
        wait_until(lambda: not first.running and not second.running)  # no request is leaked, whatever the test did


@contextmanager
def routed(pair: Pair, folder: Path, router: RouterDouble, api_key: str | None = None) -> Iterator[Rollouts]:
    """Yields an engine over the pair behind the router, serving version 0."""
    with router, rollouts([server.url for server in pair], folder, api_key=api_key, max_attempts=3) as made:
        made.fleet.route_through(router.url)
        made.sync.publish(iter(weights(0).items()), 0)
        yield made
        assert router.refused == []  # control calls go past it


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def generate(made: Rollouts, count: int = NUM_REQUESTS, length: int = 6) -> list[Completion]:
    completions = made.engine.generate(requests(count, max_new_tokens=length), NO_STOP)
    assert [len(completion.token_ids) for completion in completions] == [length] * count
    assert all(server.in_flight == 0 for server in made.fleet.servers)
    return completions


@contextmanager
def generating(made: Rollouts, count: int, length: int) -> Iterator[list[Completion]]:
    """Generates beside the test; complete at the end of the block."""
    completions: list[Completion] = []
    thread = threading.Thread(target=lambda: completions.extend(generate(made, count, length)))
    thread.start()
    yield completions
    thread.join(60)
    assert len(completions) == count


def test_generation_is_spread_by_a_router_that_starts_without_workers(pair: Pair, folder: Path) -> None:
    router = RouterDouble()
    with routed(pair, folder, router) as made:
        generate(made)
        spread = Counter(url for url, _ in router.sent)
        assert sum(spread.values()) == NUM_REQUESTS
        assert spread.keys() <= {server.url for server in pair}
        wait_until(lambda: router.ready == {server.url for server in pair})
        router.sent.clear()
        generate(made)
        assert Counter(url for url, _ in router.sent) == {server.url: NUM_REQUESTS // 2 for server in pair}


@pytest.mark.parametrize("names_workers", [True, False])
def test_a_killed_server_leaves_the_router_until_it_is_back(pair: Pair, folder: Path, names_workers: bool) -> None:
    urls = [server.url for server in pair]
    router = RouterDouble(urls, names_workers=names_workers)
    with routed(pair, folder, router) as made:
        pair[0].fault = "hang"
        with generating(made, 12, 6):
            wait_until(lambda: len(pair[0].running) == 6)
            kill(pair[0])
        pair[0].fault = "none"
        rids = [body["rid"] for _, body in router.sent]
        assert len(set(rids)) == len(rids) == 12 + 6  # each of the six again, once, under a new name
        assert router.num_failed == 6
        assert not made.fleet.servers[0].in_service
        assert router.ready == {urls[1]}
        router.sent.clear()
        pair[0].start_again("default")  # a new process, with the weights it started with
        generate(made)
        assert {url for url, _ in router.sent} == {urls[1]}
        made.sync.restore(0)
        wait_until(lambda: bool(generate(made)) and made.fleet.servers[0].in_service)
        generate(made)
        wait_until(lambda: router.ready == set(urls))
        router.sent.clear()
        generate(made)
        assert {url for url, _ in router.sent} == set(urls)


@pytest.mark.parametrize(
    "field", ["output_ids", "output_token_logprobs", "weight_versions", "finish_reason", "id", "rid"]
)
def test_a_router_that_drops_fields_ends_the_run_with_the_remedy(pair: Pair, folder: Path, field: str) -> None:
    drops = ["weight_version", "weight_versions"] if field == "weight_versions" else [field]
    named = {"weight_versions": "weight version is None", "id": "request id None", "rid": "request id 'router-"}
    router = RouterDouble([server.url for server in pair], drops=drops, names_workers=False)
    with routed(pair, folder, router) as made, pytest.raises(RuntimeError) as caught:
        generate(made, 4)
    assert f"router ({router.url}): it answers garbage" in str(caught.value)
    assert named.get(field, f"the reply has no {field}") in str(caught.value)
    assert all(f"server {index} ({server.url})" in str(caught.value) for index, server in enumerate(pair))
    assert "it drops fields" in str(caught.value) and "sglang.router_url" in str(caught.value)
    assert made.fleet.in_service() == [0, 1]  # not their fault


@pytest.mark.parametrize("names_workers", [True, False])
def test_a_wrong_version_names_router_and_suspects_and_the_guilty_one_goes(
    pair: Pair, folder: Path, names_workers: bool, caplog: pytest.LogCaptureFixture
) -> None:
    router = RouterDouble([server.url for server in pair], names_workers=names_workers)
    with routed(pair, folder, router) as made:
        pair[0].fault = "wrong_version"
        generate(made)
        server = made.fleet.servers[0]
        assert (server.in_service, server.comeback) == (False, "restart")
        assert "of policy version 99999, not 0" in server.reason
        assert router.ready == {pair[1].url}
        suspects = pair[:1] if names_workers else pair
        names = " or ".join(f"server {index} ({suspect.url})" for index, suspect in enumerate(suspects))
        version = "tokens 0..5 are of policy version 99999, not 0"
        assert f"router ({router.url}): it answers garbage: {version}, from {names}\n" in caplog.text
        pair[1].fault = "wrong_version"
        with pytest.raises(RuntimeError, match="no rollout server came into service"):
            generate(made, 2)


def test_intermittent_garbage_is_survived_and_logged_with_every_suspect(
    pair: Pair, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with routed(pair, folder, RouterDouble([server.url for server in pair], names_workers=False)) as made:
        pair[0].fault, pair[0].num_faults = "nan", 1
        generate(made)
        assert made.fleet.in_service() == [0, 1]
        assert f"log-probability 5 is nan, from server 0 ({pair[0].url}) or server 1 ({pair[1].url})" in caplog.text


def test_a_server_with_unsynced_weights_is_not_called_garbage(pair: Pair, folder: Path) -> None:
    """Behind a router that repeats by itself a restarted server answers before anybody noticed its end."""
    router = RouterDouble([server.url for server in pair])
    with routed(pair, folder, router) as made:
        pair[0].weight_version = "default"
        generate(made)
        server = made.fleet.servers[0]
        assert (server.in_service, server.comeback) == (False, "probe")
        assert router.ready == {pair[1].url}


def test_a_transfer_aborts_at_every_server_and_the_requests_go_on(pair: Pair, folder: Path) -> None:
    router = RouterDouble([server.url for server in pair])
    with routed(pair, folder, router) as made:
        for server in pair:
            set_pace(server, SLOW_S)
        with generating(made, 12, LONG) as completions:
            wait_until(lambda: all(len(server.running) == 6 for server in pair))
            time.sleep(2 * SLOW_S)
            made.fleet.withdraw("a transfer")
            assert not any(server.running for server in pair)
            for server in pair:
                set_pace(server, 0.0)
            made.sync.publish(iter(weights(1).items()), 1)
        assert {len(completion.policy_versions) for completion in completions} <= {1, 2}
        assert {span.version for c in completions for span in c.policy_versions} == {0, 1}


def test_a_straggler_is_aborted_whichever_server_has_it(pair: Pair, folder: Path) -> None:
    with routed(pair, folder, RouterDouble([server.url for server in pair])) as made:
        groups = [[GenerateRequest((5, 6), 0, 4)], [GenerateRequest((5, 6), 1, 5000)]]
        assert list(made.engine.generate_first(groups, NO_STOP, wanted=1)) == [0]
        [straggler] = {rid for server in pair for rid in server.rids if rid in server.aborts}
        assert [straggler in server.aborts for server in pair] == [True, True]
        wait_until(lambda: not any(server.running for server in pair))


def test_a_server_that_refuses_weights_leaves_the_router_until_it_takes_some(pair: Pair, folder: Path) -> None:
    router = RouterDouble([server.url for server in pair], drain_s=0.4)
    with routed(pair, folder, router) as made:
        generate(made)
        pair[0].update_fault = "500"
        made.sync.publish(iter(weights(1).items()), 1)
        router.sent.clear()
        generate(made)
        assert {url for url, _ in router.sent} == {pair[1].url}
        pair[0].update_fault = "none"
        made.sync.publish(iter(weights(2).items()), 2)  # while it drains: a router does not add it again before
        generate(made)
        wait_until(lambda: router.ready == {server.url for server in pair})


def test_a_router_that_dies_and_comes_back_empty_is_waited_for(pair: Pair, folder: Path) -> None:
    router = RouterDouble()
    with ExitStack() as stack:
        made = stack.enter_context(routed(pair, folder, router))
        generate(made)
        router.stop()
        with pytest.raises(RuntimeError, match=r"router \(.*\) out: connection refused.*server 0 .* in service"):
            generate(made, 2)
        threading.Timer(0.2, router.start).start()
        generate(made)
        assert made.fleet.in_service() == [0, 1]


def test_the_api_key_goes_to_the_router_and_with_every_worker(folder: Path) -> None:
    router = RouterDouble(api_key="sesame")
    with ExitStack() as stack:
        first, second = (stack.enter_context(SGLangDouble(folder, api_key="sesame")) for _ in range(2))
        made = stack.enter_context(routed((first, second), folder, router, api_key="sesame"))
        generate(made)
        with rollouts([first.url], folder) as other, pytest.raises(RuntimeError, match=r"401.*sglang\.api_key_env"):
            other.fleet.route_through(router.url)


BAD_IDS = (None, 7, "..", "a/b", "", "a" * 300)


@pytest.mark.parametrize(
    "row", [7, None, {}, {"url": 7, "id": "a"}, *({"url": "http://h:1", "id": name} for name in BAD_IDS)]
)
def test_a_list_of_workers_that_cannot_be_is_refused_before_anything_is_removed(row: Any) -> None:
    body = json.dumps({"workers": [row]}).encode()
    asked: list[socket.socket] = []

    def talk(peer: socket.socket) -> None:
        asked.append(peer)
        peer.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))

    limits = ClientOptions(max_concurrency=1, connect_timeout_s=2.0, control_timeout_s=10.0, api_key=None)
    with answering(talk) as url, ServerFleet(["http://127.0.0.1:1"], limits) as fleet:
        router = Router(url, ["http://127.0.0.1:1"], fleet.http)
        with pytest.raises(RuntimeError, match=rf"the router \({url}\) lists a worker without an address or an id"):
            fleet.http.run(router.follow(frozenset()))
    assert len(asked) == 1  # for the list, and nothing more


def test_a_router_that_cannot_be_used_is_explained_at_the_start(pair: Pair, folder: Path) -> None:
    with rollouts([pair[0].url], folder) as made, RouterDouble([pair[0].url, pair[1].url]) as router:
        with pytest.raises(RuntimeError) as caught:
            made.fleet.route_through(router.url)
        assert f"{pair[1].url} (DELETE {router.url}/workers/id-1)" in str(caught.value)
        assert "not this run's servers" in str(caught.value)
        with pytest.raises(RuntimeError, match=r"answers 404 to GET /workers.*smg"):
            made.fleet.route_through(pair[0].url)
        with pytest.raises(ValueError, match=r"sglang\.router_url: 'localhost:1' must start with http"):
            made.fleet.route_through("localhost:1")
        router.stop()
        with pytest.raises(RuntimeError, match=r"sglang\.router_url=.* does not answer: connection refused.*start"):
            made.fleet.route_through(router.url)


def test_the_servers_of_a_run_leave_the_router_at_its_end(pair: Pair, folder: Path) -> None:
    router = RouterDouble([server.url for server in pair])
    with routed(pair, folder, router) as made:
        generate(made, 2)
        made.fleet.leave_router()
        assert router.ready == set()
        router.stop()
        made.fleet.leave_router()  # harmless

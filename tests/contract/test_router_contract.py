"""The router as the trainer uses it, in front of two doubles: the router double and - marker ``sglang`` - smg."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from aer_megatron.rollout.engine import SamplingOptions
from aer_megatron.sglang.protocol import generate_body
from aer_megatron.types import Completion
from tests.support.real_router import real_router
from tests.support.sglang_double import SGLangDouble
from tests.support.sglang_fixtures import Rollouts, requests, rollouts, weights
from tests.support.sglang_router_double import RouterDouble, kill, set_pace

NO_STOP = SamplingOptions(0.9, 0.8, 7, frozenset())
COUNT = 12
LONG = 400  # tokens, 20 s at the slow pace
SLOW_S = 0.05


class Recording(SGLangDouble):
    """The double, which keeps what it was asked."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, token_s=0.002)
        self.bodies: dict[str, dict[str, Any]] = {}

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies[body["rid"]] = body
        return await super()._generate(request)


@pytest.fixture(scope="module", params=["double", pytest.param("real", marks=pytest.mark.sglang)])
def router(request: pytest.FixtureRequest, folder: Path) -> Iterator[str]:
    """The address of a router without workers."""
    if request.param == "double":
        with RouterDouble() as double:
            yield double.url
        return
    with real_router(folder.parent / "smg.log") as url:
        yield url


@pytest.fixture
def pair(folder: Path) -> Iterator[tuple[Recording, Recording]]:
    with Recording(folder) as first, Recording(folder) as second:
        yield first, second
        wait_until(lambda: not first.running and not second.running)


@pytest.fixture
def made(router: str, folder: Path, pair: tuple[Recording, Recording]) -> Iterator[Rollouts]:
    with rollouts([server.url for server in pair], folder, recovery_timeout_s=20.0) as made:
        wait_until(lambda: _answers(made, router))
        made.sync.publish(iter(weights(0).items()), 0)
        generate(made)
        yield made
        made.fleet.leave_router()
        wait_until(lambda: _answers(made, router) and not _workers(made))


def _answers(made: Rollouts, url: str) -> bool:
    try:
        made.fleet.route_through(url)
    except RuntimeError:
        return False
    return True


def _workers(made: Rollouts) -> list[dict[str, Any]]:
    router = made.fleet.router
    assert router is not None
    rows: list[dict[str, Any]] = made.fleet.http.run(
        made.fleet.http.call(router.url + "/workers", timeout_s=5.0)
    ).json()["workers"]
    return rows


def _ready(made: Rollouts) -> set[str]:
    return {row["url"] for row in _workers(made) if row["is_healthy"] and row["status"] == "ready"}


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def generate(made: Rollouts, length: int = 6) -> list[Completion]:
    completions = made.engine.generate(requests(COUNT, max_new_tokens=length), NO_STOP)
    assert [len(completion.token_ids) for completion in completions] == [length] * COUNT
    return completions


def in_background(made: Rollouts) -> tuple[threading.Thread, list[Completion]]:
    completions: list[Completion] = []
    thread = threading.Thread(target=lambda: completions.extend(generate(made, LONG)))
    thread.start()
    return thread, completions


def test_requests_arrive_whole_at_every_server(made: Rollouts, pair: tuple[Recording, Recording]) -> None:
    wait_until(lambda: _ready(made) == {server.url for server in pair})
    for server in pair:
        server.bodies.clear()
    generate(made)
    assert [len(server.bodies) for server in pair] == [COUNT // 2] * 2
    [request] = requests(1)
    for rid, body in (pair[0].bodies | pair[1].bodies).items():
        expected = generate_body(request, NO_STOP, rid=rid)
        expected["input_ids"] = body["input_ids"]
        expected["sampling_params"]["sampling_seed"] = body["sampling_params"]["sampling_seed"]
        assert {name: body.get(name) for name in expected} == expected


def test_control_calls_are_unknown_to_the_router(made: Rollouts) -> None:
    router = made.fleet.router
    assert router is not None
    for path in ("/abort_request", "/update_weights_from_disk", "/weights_checker", "/release_memory_occupation"):
        assert made.fleet.http.run(made.fleet.http.call(router.url + path, {}, timeout_s=5.0)).status == 404


def test_a_killed_server_loses_no_sample_and_gets_no_traffic_until_it_is_back(
    made: Rollouts, pair: tuple[Recording, Recording]
) -> None:
    wait_until(lambda: _ready(made) == {server.url for server in pair})
    for server in pair:
        server.bodies.clear()
    pair[0].fault = "hang"
    thread, completions = in_background(made)
    wait_until(lambda: len(pair[0].running) == COUNT // 2)
    set_pace(pair[1], 0.0)
    kill(pair[0])
    thread.join(60)
    assert len(completions) == COUNT
    asked = [[b for b in server.bodies.values() if b["sampling_params"]["max_new_tokens"] == LONG] for server in pair]
    assert [len(bodies) for bodies in asked] == [COUNT // 2, COUNT]  # once again, each; trials are of one token
    assert _ready(made) == {pair[1].url}
    pair[0].fault = "none"
    pair[0].start_again("default")
    pair[0].bodies.clear()
    generate(made)
    assert not pair[0].bodies
    made.sync.restore(0)
    set_pace(pair[1], 0.05)  # servers are probed while generations last
    wait_until(lambda: bool(generate(made)) and _ready(made) == {server.url for server in pair})
    generate(made)
    assert pair[0].bodies


def test_a_transfer_interrupts_and_the_requests_go_on(made: Rollouts, pair: tuple[Recording, Recording]) -> None:
    for server in pair:
        set_pace(server, SLOW_S)
    thread, completions = in_background(made)
    wait_until(lambda: sum(len(server.running) for server in pair) == COUNT)
    time.sleep(2 * SLOW_S)
    made.fleet.withdraw("a transfer")
    for server in pair:
        set_pace(server, 0.0)
    made.sync.publish(iter(weights(1).items()), 1)
    thread.join(60)
    assert len(completions) == COUNT
    assert {span.version for completion in completions for span in completion.policy_versions} == {0, 1}
    assert all(server.weight_version.endswith("/1") for server in pair)


def test_a_server_of_another_run_is_named(made: Rollouts, router: str, folder: Path) -> None:
    with rollouts([made.fleet.servers[0].url], folder) as other, pytest.raises(RuntimeError, match="not this run's"):
        other.fleet.route_through(router)

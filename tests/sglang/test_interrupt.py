"""Rollouts over a weight transfer: interrupted, continued under the new weights, raced; no request is leaked."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from aer_megatron.rollout.engine import GenerateRequest, RacingEngine, SamplingOptions
from aer_megatron.types import Completion
from tests.support.sglang_double import SGLangDouble
from tests.support.sglang_fixtures import Rollouts, rollouts, weights

NO_STOP = SamplingOptions(1.0, 1.0, 0, frozenset())
LENGTH = 30
LONG = 80  # tokens, 1.6 s or more


class Watched(SGLangDouble):
    """The double, which also keeps what it was asked and how much was under way when weights came."""

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(folder, **options)
        self.bodies: list[dict[str, Any]] = []
        self.running_at_update: list[int] = []
        self.deaf = False  # to aborts

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(await request.json())
        return await super()._generate(request)

    async def _abort(self, request: web.Request) -> web.Response:
        return web.Response() if self.deaf else await super()._abort(request)

    async def _update_from_disk(self, request: web.Request) -> web.Response:
        self.running_at_update.append(len(self.running))
        return await super()._update_from_disk(request)


@pytest.fixture
def pair(folder: Path) -> Iterator[tuple[Watched, Watched]]:
    with Watched(folder, token_s=0.02) as first, Watched(folder, token_s=0.02) as second:
        yield first, second
        wait_until(lambda: not first.running and not second.running)  # no request is leaked, whatever the test did


def wait_until(condition: Any, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class Generating(threading.Thread):
    """A generation beside the test."""

    def __init__(self, made: Rollouts, requests: list[GenerateRequest]) -> None:
        super().__init__(daemon=True)
        self._made, self._requests = made, requests
        self.completions: list[Completion] = []
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self.completions = self._made.engine.generate(self._requests, NO_STOP)
        except RuntimeError as error:
            self.error = error


def requests(count: int, length: int = LENGTH) -> list[GenerateRequest]:
    return [GenerateRequest((3, 4 + place), place, length) for place in range(count)]


def test_a_transfer_interrupts_and_every_request_goes_on_under_the_new_weights(
    pair: tuple[Watched, Watched], folder: Path
) -> None:
    with rollouts([server.url for server in pair], folder) as made:
        made.sync.publish(iter(weights(0).items()), 0)
        asked = requests(12)
        generating = Generating(made, asked)
        for version in (1, 2):
            wait_until(lambda: sum(len(server.running) for server in pair) == 12)
            time.sleep(0.1)
            made.sync.publish(iter(weights(version).items()), version)
        generating.join(30)
        assert [server.running_at_update for server in pair] == [[0, 0, 0]] * 2  # a transfer finds idle servers
        assert all(server.in_flight == 0 for server in made.fleet.servers)
    assert len(generating.completions) == 12
    bodies = [body for server in pair for body in server.bodies]
    for request, completion in zip(asked, generating.completions, strict=True):
        assert len(completion.token_ids) == len(completion.logprobs) == LENGTH
        assert completion.finish_reason == "length"
        assert completion.logprobs == tuple(-0.5 - 0.001 * token for token in completion.token_ids)
        spans = completion.policy_versions
        assert (spans[0].start, spans[-1].end) == (0, LENGTH)
        assert all(one.end == other.start and one.version < other.version for one, other in itertools.pairwise(spans))
        for span in spans[1:]:  # the request that began it carried every token before it, as ids
            [body] = [b for b in bodies if b["input_ids"] == [*request.prompt_ids, *completion.token_ids[: span.start]]]
            assert body["sampling_params"]["max_new_tokens"] == LENGTH - span.start
    assert {span.version for c in generating.completions for span in c.policy_versions} == {0, 1, 2}
    assert len({body["rid"] for body in bodies}) == len(bodies)


def test_a_generation_that_begins_during_a_transfer_waits_for_it(pair: tuple[Watched, Watched], folder: Path) -> None:
    with rollouts([pair[0].url], folder, recovery_timeout_s=0.05) as made:
        made.sync.publish(iter(weights(0).items()), 0)
        made.fleet.withdraw("a transfer that takes longer than recovery_timeout_s")
        generating = Generating(made, requests(2, 3))
        time.sleep(0.2)
        assert generating.is_alive() and not pair[0].running
        made.fleet.serve(0, {})
        generating.join(10)
        assert len(generating.completions) == 2


def test_closing_aborts_what_is_under_way(pair: tuple[Watched, Watched], folder: Path) -> None:
    with rollouts([pair[0].url], folder) as made:
        made.sync.publish(iter(weights(0).items()), 0)
        generating = Generating(made, requests(4, 1000))
        wait_until(lambda: len(pair[0].running) == 4)
        made.fleet.http.close()
        generating.join(10)
        assert "closed" in str(generating.error)
        assert sorted(pair[0].aborts) == sorted(pair[0].rids)


def test_the_first_whole_groups_win_and_the_others_are_aborted(pair: tuple[Watched, Watched], folder: Path) -> None:
    with rollouts([server.url for server in pair], folder, max_concurrency=16) as made:
        made.sync.publish(iter(weights(0).items()), 0)
        assert isinstance(made.engine, RacingEngine)
        # groups 1 and 4 have a straggler each; 14 names that begin alike: an abort must end one request alone
        groups = [[GenerateRequest((5, 6 + g), g * 3 + s, 4) for s in range(3)] for g in range(5)]
        for slow in (1, 4):
            groups[slow][2] = GenerateRequest((5, 6), 99, 2000)
        won = made.engine.generate_first(groups, NO_STOP, wanted=3)
        assert sorted(won) == [0, 2, 3]
        assert all(len(completions) == 3 for completions in won.values())
        assert all(len(completion.token_ids) == 4 for group in won.values() for completion in group)
        wait_until(lambda: sum(len(server.aborts) for server in pair) == 2)
        aborted = {rid for server in pair for rid in server.aborts}
        long = {b["rid"] for s in pair for b in s.bodies if b["sampling_params"]["max_new_tokens"] == 2000}
        assert aborted == long
        assert all(server.in_flight == 0 for server in made.fleet.servers)


def test_a_race_that_cannot_be_won_says_why(pair: tuple[Watched, Watched], folder: Path) -> None:
    with rollouts([pair[0].url], folder) as made:
        made.sync.publish(iter(weights(0).items()), 0)
        pair[0].fault = "nan"
        with pytest.raises(RuntimeError, match="log-probability"):
            made.engine.generate_first([requests(2, 3), requests(2, 3)], NO_STOP, wanted=1)


def test_a_server_that_ignores_the_interruption_does_not_hold_up_the_transfer(
    pair: tuple[Watched, Watched], folder: Path
) -> None:
    with rollouts([server.url for server in pair], folder) as made:
        made.fleet.http.options = dataclasses.replace(made.fleet.http.options, control_timeout_s=0.5)
        made.sync.publish(iter(weights(0).items()), 0)
        pair[0].deaf = True
        generating = Generating(made, requests(4, LONG))
        wait_until(lambda: sum(len(server.running) for server in pair) == 4)
        time.sleep(0.1)
        began = time.monotonic()
        made.fleet.withdraw("weights are about to be transferred")
        assert 0.4 < time.monotonic() - began < 5
        assert "no answer to /abort_request within 0.5 s" in made.fleet.servers[0].reason
        assert not made.fleet.calls._under_way
        pair[0].deaf = False
        made.sync.publish(iter(weights(1).items()), 1)
        generating.join(30)
        assert [len(completion.token_ids) for completion in generating.completions] == [LONG] * 4

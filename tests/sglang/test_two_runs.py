"""Two runs on one server: neither takes what the other's weights sampled, whatever their version numbers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from aer_megatron.sglang.transports import TRANSPORTS
from tests.support.sglang_double import SGLangDouble
from tests.support.sglang_fixtures import OPTIONS, Rollouts, requests, rollouts, weights


@pytest.fixture
def server(folder: Path) -> Iterator[SGLangDouble]:
    with SGLangDouble(folder) as double:
        yield double


def publish(made: Rollouts, seed: int, version: int) -> None:
    made.sync.publish(iter(weights(seed).items()), version)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_run_that_came_first_refuses_and_names_the_other_s_weights(
    transport: str, server: SGLangDouble, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        rollouts([server.url], folder, transport=transport) as one,
        rollouts([server.url], folder, transport=transport) as two,
    ):
        publish(one, 0, 5)
        assert one.engine.generate(requests(2), OPTIONS)
        publish(two, 1, 5)
        assert f"served {one.labels.verified(5)}, weights of another run; it is this run's now" in caplog.text
        theirs = rf"serves '{two.labels.verified(5)}', weights of another run \(this one is {one.labels.run}\)"
        with pytest.raises(RuntimeError, match=theirs):
            one.engine.generate(requests(2), OPTIONS)
        with pytest.raises(RuntimeError, match=theirs):  # and does not take the server back at the next step
            publish(one, 0, 6)
        assert len(two.engine.generate(requests(2), OPTIONS)) == 2
        publish(two, 2, 6)


def test_a_server_that_another_run_took_does_not_cost_the_others(server: SGLangDouble, folder: Path) -> None:
    with (
        SGLangDouble(folder) as own,
        rollouts([server.url, own.url], folder) as one,
        rollouts([server.url], folder) as two,
    ):
        publish(one, 0, 5)
        publish(two, 1, 5)
        assert len(one.engine.generate(requests(8), OPTIONS)) == 8
        publish(one, 0, 6)
        assert one.fleet.in_service() == [1]
        assert one.replaced == [0]  # a launched one is taken back
        server.stop()
        server.start_again("default")  # whoever restarts it gives it back
        publish(one, 0, 7)
        assert one.fleet.in_service() == [0, 1]


def test_a_server_is_back_only_with_this_run_s_label(server: SGLangDouble, folder: Path) -> None:
    with SGLangDouble(folder) as own, rollouts([server.url, own.url], folder) as one:
        publish(one, 0, 0)
        server.stop()
        assert len(one.engine.generate(requests(8), OPTIONS)) == 8
        server.start_again("aer-fedcba9876543210/0")
        own.fault = "slow"
        assert len(one.engine.generate(requests(8), OPTIONS)) == 8
        assert one.fleet.in_service() == [1]

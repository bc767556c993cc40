"""What the client makes of misbehaving servers: every fault has one named outcome and leaks no request."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.sglang_double import Fault, SGLangDouble
from tests.support.sglang_fixtures import OPTIONS, Rollouts, requests, rollouts, weights

NUM_REQUESTS = 24


@pytest.fixture
def pair(folder: Path) -> Iterator[tuple[SGLangDouble, SGLangDouble]]:
    with SGLangDouble(folder) as first, SGLangDouble(folder) as second:
        yield first, second
        assert first.running == {} and second.running == {}  # no request is leaked, whatever the test did


def opened(stack: ExitStack, servers: tuple[SGLangDouble, ...], folder: Path, **limits: float) -> Rollouts:
    made = stack.enter_context(rollouts([server.url for server in servers], folder, **limits))
    made.sync.publish(iter(weights(0).items()), 0)
    return made


def state(made: Rollouts, index: int = 0) -> tuple[bool, str, str]:
    server = made.fleet.servers[index]
    return server.in_service, server.comeback, server.reason


@pytest.mark.parametrize(
    ("fault", "in_service", "comeback", "reason"),
    [
        ("slow", True, "probe", ""),
        ("500", False, "transfer", "3 calls in a row failed, the last: /generate answers 500: internal"),
        ("reset", True, "probe", "the connection broke"),  # back at once: it still holds the verified version
        ("truncated", True, "probe", "the body was cut off"),
        ("hang", False, "transfer", "no answer to /generate within 1 s"),
        ("wrong_version", False, "restart", "of policy version 99999, not 0"),
        ("nan", False, "restart", "log-probability 5 is nan"),
        ("counts", False, "restart", "5 log-probabilities came for 6 tokens"),
        ("not_json", False, "restart", "the body is not JSON"),
        ("redirect", False, "transfer", "/generate answers 307"),
        ("foreign_version", False, "transfer", "weights of another run"),
        ("version_of_5000_digits", False, "restart", "never verified"),
        ("beyond_vocabulary", False, "restart", "token 5 is 1000000, not an id of the 25"),
        ("negative_id", False, "restart", "token 5 is -1"),
        ("id_2_63", False, "restart", "token 5 is 9223372036854775808"),
        ("id_true", False, "restart", "token 5 is True"),
        ("logprob_beyond_fp32", False, "restart", "log-probability 5 is -1e+39"),
        ("logprob_of_400_digits", False, "restart", "log-probability 5 is -1000"),
        ("positive_logprob", False, "restart", "log-probability 5 is 0.5"),
        ("short_length", False, "restart", "'length' after 2 of 6 tokens"),
        ("number_of_5000_digits", False, "restart", "4300 digits"),
        ("nested", False, "restart", "nested too deep"),
        ("endless", False, "restart", "longer than the 68608 bytes"),
        ("gzip_bomb", False, "restart", "encoding 'gzip', which was not asked for"),
        ("list", False, "restart", "the reply has no meta_info"),
        ("null", False, "restart", "the reply has no meta_info"),
    ],
)
def test_a_fault_of_one_server_costs_no_completion(
    fault: Fault,
    in_service: bool,
    comeback: str,
    reason: str,
    pair: tuple[SGLangDouble, SGLangDouble],
    folder: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with ExitStack() as stack:
        made = opened(stack, pair, folder, request_timeout_s=1.0)
        pair[0].fault = fault
        never = frozenset[int]()
        completions = made.engine.generate(requests(NUM_REQUESTS), type(OPTIONS)(1.0, 1.0, 0, never))
        assert len(completions) == NUM_REQUESTS
        assert all(len(completion.token_ids) == 6 for completion in completions)
        assert all(server.in_flight == 0 for server in made.fleet.servers)
        if not in_service:
            assert state(made)[:2] == (False, comeback)
            assert reason in state(made)[2]
        assert reason in caplog.text  # named
        assert state(made, 1)[0]  # the other one stays
        if fault == "slow":
            assert pair[0].num_completed > 0
        if fault == "hang":
            hung = [rid for rid in pair[0].rids if rid in pair[0].aborts]
            assert len(hung) >= 1
            deadline = time.monotonic() + 2
            while pair[0].running and time.monotonic() < deadline:
                time.sleep(0.01)


def test_few_failures_in_a_row_do_not_retire_a_server(pair: tuple[SGLangDouble, SGLangDouble], folder: Path) -> None:
    with ExitStack() as stack:
        made = opened(stack, pair[:1], folder)
        pair[0].fault, pair[0].num_faults = "500", 2
        assert len(made.engine.generate(requests(8), OPTIONS)) == 8
        assert state(made)[0]


def test_an_abort_before_the_first_token_is_repeated_and_no_fault_of_the_server(
    pair: tuple[SGLangDouble, SGLangDouble], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever else may call a server can abort everything on it."""
    with ExitStack() as stack:
        made = opened(stack, pair[:1], folder, recovery_timeout_s=0.0, max_failures=1)
        pair[0].fault, pair[0].num_faults = "aborted", 4
        assert len(made.engine.generate(requests(8), OPTIONS)) == 8
        assert state(made)[0] and "out of service" not in caplog.text


def test_every_attempt_has_a_name_of_its_own(pair: tuple[SGLangDouble, SGLangDouble], folder: Path) -> None:
    with ExitStack() as stack:
        made = opened(stack, pair, folder)
        pair[0].fault, pair[0].num_faults = "truncated", 2
        made.engine.generate(requests(NUM_REQUESTS), OPTIONS)
        rids = pair[0].rids + pair[1].rids
        assert len(set(rids)) == len(rids) == NUM_REQUESTS + 2
        assert len(pair[0].aborts) == 2  # the two that broke may still have been under way


def test_without_a_server_left_every_server_is_named(pair: tuple[SGLangDouble, SGLangDouble], folder: Path) -> None:
    with ExitStack() as stack:
        made = opened(stack, pair, folder)
        pair[0].fault = pair[1].fault = "nan"
        with pytest.raises(RuntimeError, match=r"server 0 .*log-probability.*server 1 .*log-probability"):
            made.engine.generate(requests(4), OPTIONS)


def test_a_request_that_fails_everywhere_ends_the_run(pair: tuple[SGLangDouble, SGLangDouble], folder: Path) -> None:
    with ExitStack() as stack:
        made = opened(stack, pair, folder, max_failures=1000, max_attempts=3)
        pair[0].fault = pair[1].fault = "500"
        with pytest.raises(RuntimeError, match=r"max_attempts=3 times: server . .*internal"):
            made.engine.generate(requests(4), OPTIONS)


def test_a_server_that_went_away_comes_back_only_with_the_verified_version(
    pair: tuple[SGLangDouble, SGLangDouble], folder: Path
) -> None:
    with ExitStack() as stack:
        made = opened(stack, pair, folder, recovery_timeout_s=10.0)
        pair[0].stop()
        made.engine.generate(requests(NUM_REQUESTS), OPTIONS)
        assert state(made)[:2] == (False, "probe")
        assert "connection refused" in state(made)[2]
        pair[0].start_again("default")  # a new process, with the weights it started with
        before = pair[0].num_completed
        pair[1].fault = "slow"
        made.engine.generate(requests(NUM_REQUESTS), OPTIONS)
        assert not state(made)[0]
        assert pair[0].num_completed == before
        made.sync.restore(0)
        made.engine.generate(requests(NUM_REQUESTS), OPTIONS)
        assert state(made)[0]


def test_a_step_waits_for_a_server_that_comes_back(pair: tuple[SGLangDouble, SGLangDouble], folder: Path) -> None:
    with ExitStack() as stack:
        made = opened(stack, pair[:1], folder, recovery_timeout_s=20.0)
        pair[0].stop()
        threading.Timer(0.3, pair[0].start_again, [made.labels.verified(0)]).start()
        assert len(made.engine.generate(requests(8), OPTIONS)) == 8


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where the tests run as a background job, which inherits it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_aborts_what_is_under_way(folder: Path) -> None:
    with SGLangDouble(folder, token_s=0.2) as server, rollouts([server.url], folder) as made:
        made.sync.publish(iter(weights(0).items()), 0)
        threading.Timer(0.5, _interrupt_main).start()
        with pytest.raises(KeyboardInterrupt):
            made.engine.generate(requests(8, max_new_tokens=1000), type(OPTIONS)(1.0, 1.0, 0, frozenset()))
        deadline = time.monotonic() + 5
        while server.running and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.running == {}
        assert sorted(server.aborts) == sorted(server.rids)
        server._args = (*server._args[:2], 0.0, *server._args[3:])
        assert len(made.engine.generate(requests(4), OPTIONS)) == 4  # the client is fit for the next call


def _interrupt_main() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_concurrency_stays_within_its_limit(folder: Path) -> None:
    with SGLangDouble(folder, token_s=0.01) as server, rollouts([server.url], folder, max_concurrency=3) as made:
        made.sync.publish(iter(weights(0).items()), 0)
        peak = 0
        done = threading.Event()

        def look() -> None:
            nonlocal peak
            while not done.is_set():
                peak = max(peak, len(server.running))
                time.sleep(0.001)

        watcher = threading.Thread(target=look)
        watcher.start()
        made.engine.generate(requests(12), OPTIONS)
        done.set()
        watcher.join()
        assert peak == 3


def test_the_api_key_is_sent_and_its_absence_explained(folder: Path) -> None:
    with SGLangDouble(folder, api_key="sesame") as server:
        with rollouts([server.url], folder, api_key="sesame") as made:
            made.sync.publish(iter(weights(0).items()), 0)
            assert made.engine.generate(requests(2), OPTIONS)
        with rollouts([server.url], folder) as made:
            with pytest.raises(RuntimeError, match="answers 401"):
                made.sync.publish(iter(weights(0).items()), 1)
            made.fleet.serve(0, {})
            with pytest.raises(RuntimeError, match=r"sglang\.api_key_env"):
                made.engine.generate(requests(2), OPTIONS)


def test_nothing_is_generated_before_the_first_transfer_or_after_the_end(folder: Path) -> None:
    with SGLangDouble(folder) as server, rollouts([server.url], folder) as made:
        with pytest.raises(RuntimeError, match="no weights yet"):
            made.engine.generate(requests(1), OPTIONS)
        made.sync.publish(iter(weights(0).items()), 0)
        made.fleet.http.close()
        made.fleet.http.close()
        with pytest.raises(RuntimeError, match="closed"):
            made.engine.generate(requests(1), OPTIONS)

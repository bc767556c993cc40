"""The requests to stop of one process: real signals to this one, sent while it pretends to load, to train, to close."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from aer_megatron.parallel import stop
from aer_megatron.parallel.stop import Cause, StopRequests, StopRun

PATIENCE_S = 20.0


class Said:
    """What was said to the user, and the code with which the process would have ended at once."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.code: int | None = None

    def end(self, code: int) -> None:
        self.code = code


class Store:
    def __init__(self) -> None:
        self.keys: dict[str, str] = {}

    def check(self, keys: list[str]) -> bool:
        return set(keys) <= self.keys.keys()

    def get(self, key: str) -> bytes:
        return self.keys[key].encode()

    def set(self, key: str, value: str) -> None:
        self.keys[key] = value


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def said() -> Said:
    return Said()


def loading(said: Said) -> StopRequests:
    return StopRequests(said.lines.append, end=said.end)


@contextmanager
def steps(said: Said, **options: float) -> Iterator[StopRequests]:
    with StopRequests(said.lines.append, end=said.end, **options) as stops:
        stops.begin_steps()
        stops.enter_phase("train", 12)
        yield stops


@contextmanager
def hangup(handler: signal.Handlers) -> Iterator[None]:
    """Sets what SIGHUP does to this process: under nohup it begins ignored."""
    before = signal.signal(signal.SIGHUP, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "code", "again"),
    [
        (signal.SIGTERM, 143, "a second signal ends it at once"),
        (signal.SIGINT, 130, "press Ctrl-C again to end at once"),
        (signal.SIGUSR1, 0, "a second signal ends it at once"),
    ],
)
def test_a_signal_in_a_step_is_a_request(said: Said, number: signal.Signals, code: int, again: str) -> None:
    with steps(said) as stops:
        assert not stops.requested()
        send(number)
        wait_until(lambda: said.lines)
        assert said.lines == [f"{number.name}: finishing step 12, then saving; {again}"]
        assert stops.requested()
        assert stops.agreed.exit_code == code
    assert said.code is None


def test_the_line_is_said_while_the_main_thread_hears_nothing(said: Said) -> None:
    """A handler of Python's would run after the call; the line comes during it."""
    heard: list[float] = []
    with StopRequests(lambda line: heard.append(time.monotonic()), end=said.end) as stops:
        stops.begin_steps()
        timer = threading.Timer(0.1, lambda: send(signal.SIGTERM))
        timer.start()
        deadline = time.monotonic() + PATIENCE_S
        signal.pthread_sigmask(signal.SIG_BLOCK, ())  # nothing is blocked: the handler waits for this thread alone
        while not heard and time.monotonic() < deadline:
            sum(range(200_000))  # one call into C after the other
        assert heard
        timer.join()


def test_the_terminals_signal_handed_on_by_a_launcher_is_one_press(said: Said) -> None:
    with steps(said) as stops:
        send(signal.SIGINT)
        wait_until(lambda: said.lines)
        send(signal.SIGINT)
        time.sleep(0.2)
        assert said.code is None
        assert stops.requested()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_press_ends_at_once(
    said: Said, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    monkeypatch.setattr(stop, "_SAME_PRESS_S", 0.05)
    with steps(said):
        send(number)
        wait_until(lambda: said.lines)
        time.sleep(0.1)
        send(signal.SIGUSR1)  # no hurry in that one
        send(number)
        wait_until(lambda: said.code is not None)
    assert said.code == code


def test_a_signal_while_loading_leaves_at_once_and_tells_the_other_ranks(said: Said) -> None:
    store = Store()
    with pytest.raises(StopRun) as left, loading(said) as stops, stops.shared(store, int):
        send(signal.SIGINT)
        time.sleep(PATIENCE_S)
    assert left.value.cause is Cause.SIGINT
    assert len(said.lines) == 1
    assert "nothing to save" in said.lines[0]
    assert store.keys == {"aer_megatron/stop": "3"}


def test_a_rank_that_loads_hears_of_the_signal_to_another(said: Said) -> None:
    store = Store()
    store.set("aer_megatron/stop", "4")
    with pytest.raises(StopRun) as left, loading(said) as stops, stops.shared(store, int):
        time.sleep(PATIENCE_S)
    assert left.value.cause is Cause.SIGTERM


def test_a_collective_that_fails_because_a_rank_was_stopped_is_no_error(said: Said) -> None:
    store = Store()
    with pytest.raises(StopRun), loading(said) as stops, stops.shared(store, int):
        store.set("aer_megatron/stop", "2")
        raise RuntimeError("connection closed by peer")


def test_a_call_that_does_not_come_back_is_left_at_the_end(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop, "_STUCK_S", 0.1)
    with loading(said) as stops:
        stops._leaving = False
        monkeypatch.setattr(stops, "_handle", lambda number, frame: None)
        signal.signal(signal.SIGTERM, stops._handle)  # the main thread never gets round to it
        send(signal.SIGTERM)
        wait_until(lambda: said.code == 143)


def test_the_other_ranks_request_counts_also_without_an_own_one(said: Said) -> None:
    with steps(said) as stops, stops.shared(None, lambda own: max(own, int(Cause.SIGTERM))):
        assert stops.requested()
    assert stops.agreed is Cause.SIGTERM


def test_the_time_limit_asks_when_the_next_step_would_not_fit(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(stop.time, "monotonic", lambda: now[0])
    with steps(said, max_hours=1.0) as stops:
        answers = []
        for duration_s in (900.0, 1100.0, 400.0, 200.0):  # 1,100 s more do not fit after 2,600
            now[0] += duration_s
            answers.append(stops.requested())
    assert answers == [False, False, False, True]
    assert stops.agreed is Cause.TIME_LIMIT
    assert stops.agreed.exit_code == 0


def test_a_terminal_that_is_gone_ends_nothing(said: Said) -> None:
    with hangup(signal.SIG_DFL), steps(said) as stops:
        send(signal.SIGHUP)
        wait_until(lambda: said.lines)
        assert "the run goes on" in said.lines[0]
        assert not stops.requested()


def test_nohup_is_left_as_it_is(said: Said) -> None:
    with hangup(signal.SIG_IGN), steps(said):
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_handlers_and_descriptors_are_put_back(said: Said) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)]
    files = len(os.listdir("/proc/self/fd"))
    with steps(said):
        pass
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)] == before
    assert len(os.listdir("/proc/self/fd")) == files

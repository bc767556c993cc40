"""The watchdog of one process: when it speaks, what it says, and that it is quiet otherwise."""

from __future__ import annotations

import threading
import time
import traceback

import pytest

from aer_megatron.parallel.watchdog import HANG_EXIT_CODE, Watchdog, call_name


class Store:
    """An alarm store in memory."""

    def __init__(self) -> None:
        self.keys: set[str] = set()

    def check(self, keys: list[str]) -> bool:
        return set(keys) <= self.keys

    def set(self, key: str, value: str) -> None:
        self.keys.add(key)


class LostStore:
    def check(self, keys: list[str]) -> bool:
        raise RuntimeError("connection lost")

    def set(self, key: str, value: str) -> None:
        raise RuntimeError("connection lost")


class Ending:
    """Stands for the end of the process."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.code: int | None = None
        self.ended = threading.Event()

    def stop(self, code: int) -> None:
        self.code = code
        self.ended.set()


def watchdog(ending: Ending, store: object = None, timeout_s: float = 0.3) -> Watchdog:
    return Watchdog(
        rank=3,
        num_ranks=4,
        timeout_s=timeout_s,
        say=ending.said.append,
        store=store,  # type: ignore[arg-type]
        advice=lambda: "go on from step 12",
        stop=ending.stop,
    )


@pytest.mark.processes
def test_a_call_that_does_not_return_is_named_with_phase_step_and_stack() -> None:
    ending, store = Ending(), Store()
    with watchdog(ending, store) as watched:
        watched.enter_phase("sync", 4)
        with watched.waiting("POST http://server/update_weights"):
            assert ending.ended.wait(10)
    assert ending.code == HANG_EXIT_CODE
    assert store.keys
    text = "\n".join(ending.said)
    for part in ("[rank 3]", "phase sync of step 4", "POST http://server/update_weights", "go on from step 12"):
        assert part in text
    assert "test_a_call_that_does_not_return_is_named_with_phase_step_and_stack" in text  # the stack


@pytest.mark.processes
def test_the_alarm_of_another_rank_makes_a_busy_one_speak() -> None:
    ending, store = Ending(), Store()
    with watchdog(ending, store, timeout_s=1.0) as watched:
        watched.enter_phase("rollout", 0)
        other = watchdog(Ending(), store)
        other._raise_alarm()
        while not ending.ended.is_set():
            watched.enter_phase("rollout", 0)
            time.sleep(0.02)
    assert "another rank hangs" in ending.said[0]


@pytest.mark.processes
def test_ranks_that_do_not_answer_the_alarm_are_named() -> None:
    ending, store = Ending(), Store()
    store.keys |= {"aer_megatron/hang/0"}  # rank 0 has answered; this one is rank 3
    with watchdog(ending, store):
        assert ending.ended.wait(10)
    assert "no word from ranks 1, 2:" in ending.said[-1]


@pytest.mark.processes
def test_progress_keeps_it_quiet() -> None:
    ending = Ending()
    with watchdog(ending, Store()) as watched:
        for step in range(20):
            watched.enter_phase("train", step)
            time.sleep(0.05)
    assert not ending.said
    assert ending.code is None


@pytest.mark.processes
def test_a_call_within_the_limit_gives_its_phase_new_time() -> None:
    ending = Ending()
    with watchdog(ending, None, timeout_s=0.5) as watched:
        for _ in range(6):
            with watched.waiting("a short call"):
                time.sleep(0.15)
    assert not ending.said


@pytest.mark.processes
def test_a_lost_store_does_not_silence_the_report() -> None:
    ending = Ending()
    with watchdog(ending, LostStore()):
        assert ending.ended.wait(10)
    assert ending.code == HANG_EXIT_CODE
    assert any("phase start" in text for text in ending.said)
    assert any("cannot be told" in text for text in ending.said)


def test_zero_is_off() -> None:
    before = threading.active_count()
    with watchdog(Ending(), Store(), timeout_s=0):
        assert threading.active_count() == before


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        ([("/x/torch/distributed/distributed_c10d.py", "all_reduce")], "all_reduce"),
        ([("/x/torch/distributed/distributed_c10d.py", "barrier"), ("/x/other.py", "inner")], "barrier"),
        ([("/lib/http/client.py", "getresponse"), ("/lib/http/client.py", "begin")], "getresponse"),
        ([("/x/aer_megatron/loop/synchronous.py", "run")], None),
    ],
)
def test_the_call_is_read_off_the_stack(frames: list[tuple[str, str]], expected: str | None) -> None:
    stack = [traceback.FrameSummary(file, 1, name, line="") for file, name in frames]
    assert call_name(stack) == expected

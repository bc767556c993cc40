from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from aer_megatron.rewards.messages import decode_prompt, encode_prompt
from aer_megatron.rewards.pool import Job, VerifierPool
from aer_megatron.types import Prompt, Verdict

pytestmark = pytest.mark.processes

MODULE = "tests.support.bad_verifiers"


def job(function: str, text: str = "x", answer: str = "x") -> Job:
    name = f"{MODULE}:{function}"
    return Job(name, text, Prompt(1, "p", (1,), answer, name))


def math_job(answer: str, gold: str) -> Job:
    return Job("math", rf"so \boxed{{{answer}}}", Prompt(1, "p", (1,), gold, "math"))


def worker_pids(pool: VerifierPool) -> list[int]:
    return [worker._guard.pid for worker in pool._workers]


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def pool() -> Iterator[VerifierPool]:
    with VerifierPool(num_workers=2, timeout_s=3.0) as made:
        yield made


@pytest.mark.parametrize(
    ("function", "text", "verdict"),
    [
        ("exact", "x", Verdict(1.0, "correct")),
        ("exact", "y", Verdict(0.0, "wrong")),
        ("partial", "x", Verdict(0.25, "scored")),
        ("labelled", "x", Verdict(0.5, "half_right")),
        ("sleep_forever", "hang", Verdict(0.0, "timeout")),
        ("hold_the_interpreter", "x", Verdict(0.0, "timeout")),
        ("raise_error", "x", Verdict(0.0, "verifier_error_zero_division_error")),
        ("raise_http_error", "x", Verdict(0.0, "verifier_error_http_error")),
        ("raise_interrupt", "x", Verdict(0.0, "verifier_error_keyboard_interrupt")),
        ("raise_speechless", "x", Verdict(0.0, "verifier_error_speechless")),
        ("recurse", "x", Verdict(0.0, "verifier_error_recursion_error")),
        ("take_memory", "x", Verdict(0.0, "verifier_error_os_error")),
        ("exit_python", "x", Verdict(0.0, "verifier_error_system_exit")),
        ("end_process", "die", Verdict(0.0, "crashed")),
        ("kill_self", "x", Verdict(0.0, "crashed")),
        ("nothing", "x", Verdict(0.0, "verifier_error_type_error")),
        ("not_a_number", "x", Verdict(0.0, "verifier_error_value_error")),
        ("wrong_type", "x", Verdict(0.0, "verifier_error_type_error")),
        ("odd_label", "Wrong format", Verdict(0.0, "wrong_format")),
        ("odd_label", "\ud800\n\x00", Verdict(0.0, "other")),
        ("odd_label", "x" * 1_000_000, Verdict(0.0, "x" * 48)),
        ("shout", "x", Verdict(1.0, "correct")),
        ("close_everything", "x", Verdict(0.0, "crashed")),
        ("send_garbage", "x", Verdict(0.0, "crashed")),
        ("send_other_number", "x", Verdict(0.0, "crashed")),
        ("send_too_much", "x", Verdict(0.0, "crashed")),
        ("send_nan", "x", Verdict(0.0, "crashed")),
        ("send_half_and_sleep", "x", Verdict(0.0, "timeout")),
        ("fork_both", "x", Verdict(1.0, "correct")),
        ("fork_and_leave", "x", Verdict(0.0, "crashed")),
    ],
)
def test_whatever_a_verifier_does_is_a_counted_verdict(
    pool: VerifierPool, function: str, text: str, verdict: Verdict
) -> None:
    assert pool.verify([job(function, text)]) == [verdict]


def test_order_is_kept_when_later_answers_finish_first(pool: VerifierPool) -> None:
    delays = [0.3, 0.0, 0.1, 0.0, 0.2, 0.0]
    verdicts = pool.verify([job("echo_after_delay", str(delay)) for delay in delays])
    assert [verdict.reward for verdict in verdicts] == delays


def test_one_hang_and_one_crash_leave_the_other_answers_alone(pool: VerifierPool) -> None:
    jobs = [
        job("exact"),
        job("sleep_forever", "hang"),
        job("exact"),
        job("end_process", "die"),
        job("exact", "y"),
    ]
    reasons = [verdict.reason for verdict in pool.verify(jobs)]
    assert reasons == ["correct", "timeout", "correct", "crashed", "wrong"]


def test_a_worker_that_died_while_idle_is_replaced(pool: VerifierPool) -> None:
    pool.verify([job("exact"), job("exact")])
    for pid in worker_pids(pool):
        os.kill(pid, 9)
    time.sleep(0.1)
    assert [verdict.reason for verdict in pool.verify([job("exact"), job("exact")])] == ["correct", "correct"]


def test_what_a_verifier_left_behind_answers_no_later_job() -> None:
    answers = ["x", "y", "x", "y", "x", "y"]
    with VerifierPool(num_workers=1, timeout_s=10.0) as pool:
        for function in ("fork_both", "send_twice"):
            pool.verify([job(function), job("exact")])
            assert [verdict.reward for verdict in pool.verify([job("exact", text) for text in answers])] == [
                float(text == "x") for text in answers
            ]


def test_a_child_that_a_verifier_left_running_costs_no_worker() -> None:
    with VerifierPool(num_workers=1, timeout_s=10.0) as pool:
        pool.verify([job("exact")])
        pids = worker_pids(pool)
        for _ in range(5):
            assert pool.verify([job("fork_both")])[0].reason == "correct"
            time.sleep(0.05)  # the child has come back from the verifier as well
        assert worker_pids(pool) == pids


def test_memory_is_bounded_beyond_what_is_loaded_and_only_if_asked() -> None:
    with VerifierPool(num_workers=1, timeout_s=10.0, memory_mb=0) as pool:
        assert pool.verify([job("take_memory")])[0].reason == "correct"


def test_an_answer_whose_process_was_killed_is_tried_once_more(tmp_path: Path) -> None:
    with VerifierPool(num_workers=2, timeout_s=30.0) as pool:
        jobs = [job("exact"), job("die_once", answer=str(tmp_path / "note")), job("exact", "y")]
        assert [verdict.reason for verdict in pool.verify(jobs)] == ["correct", "correct", "wrong"]
        assert pool.verify([job("kill_self")]) == [Verdict(0.0, "crashed")]


def test_an_answer_is_repeated_when_its_guard_is_killed() -> None:
    with VerifierPool(num_workers=1, timeout_s=30.0) as pool:
        pool.verify([job("exact")])
        killer = threading.Timer(0.5, os.kill, (worker_pids(pool)[0], 9))
        killer.start()
        assert pool.verify([job("echo_after_delay", "1.5")]) == [Verdict(1.5, "echo")]
        killer.join()


@pytest.mark.parametrize("text", ["hang", "die", "x"])
def test_processes_that_left_their_session_end_with_the_worker(tmp_path: Path, text: str) -> None:
    with VerifierPool(num_workers=1, timeout_s=3.0) as pool:
        pool.verify([job("leave_daemons", text, str(tmp_path))])
        pids = [int(note.read_text(encoding="utf-8")) for note in tmp_path.iterdir()]
        assert len(pids) == 3
    assert not any(map(is_alive, pids))


def test_metadata_arrives_as_it_was_sent() -> None:
    metadata = {"a": (1, [2.5, None, {"tuple": "x"}]), "b": {1: {"x"}, (2, 3): frozenset({True})}, "c": np.str_("s")}
    prompt = Prompt(2**64 - 1, "p\ud800", (1, 2), "x", f"{MODULE}:exact", metadata)
    assert decode_prompt(json.loads(encode_prompt(prompt))) == prompt
    with pytest.raises(ValueError, match=r"metadata of prompt 5 .*it holds a object"):
        encode_prompt(Prompt(5, "p", (1,), "x", "math", {"a": object()}))


def test_close_leaves_no_process_not_even_of_a_hanging_verifier(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    with VerifierPool(num_workers=1, timeout_s=1.5) as pool:
        assert pool.verify([job("spawn_and_hang", answer=str(note))])[0].reason == "timeout"
        pool.verify([job("exact")])
        pids = worker_pids(pool)
        assert pids and all(is_alive(pid) for pid in pids)
    assert not any(is_alive(pid) for pid in pids)
    grandchild = int(note.read_text(encoding="utf-8"))
    deadline = time.monotonic() + 5.0
    while is_alive(grandchild) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_alive(grandchild)
    with pytest.raises(RuntimeError, match="closed"):
        pool.verify([job("exact")])


def test_workers_start_on_first_use_only() -> None:
    with VerifierPool(num_workers=2, timeout_s=1.0) as pool:
        assert pool.verify([]) == []
        assert worker_pids(pool) == []
        pool.verify([job("exact")])
        assert len(worker_pids(pool)) == 1
    with VerifierPool(num_workers=2, timeout_s=1.0) as pool:
        pool.warm([f"{MODULE}:exact"])
        assert len(worker_pids(pool)) == 2


def test_a_verifier_that_cannot_be_loaded_stops_the_run() -> None:
    with VerifierPool(num_workers=1, timeout_s=1.0) as pool:
        name = f"{MODULE}:missing"
        with pytest.raises(RuntimeError, match=r"bad_verifiers:missing.*cannot be loaded.*cannot be imported"):
            pool.verify([Job(name, "x", Prompt(1, "p", (1,), "x", name))])
        assert pool.verify([job("exact")])[0].reason == "correct"  # the pool is not stuck


def test_math_in_workers() -> None:
    cases = [
        (r"\frac{1}{2}", "0.5", "correct"),
        (r"9^{99999999}", "5", "wrong"),  # a number that is never written out
        (r"\frac{1}{}", "5", "unparseable"),
        ("@@@", "5", "unparseable"),
        (r"\frac{1}{3}", "0.5", "wrong"),
        (r"\frac{1}{3}", r"\frac{", "bad_gold"),
        (r"(1, \frac{2}{4})", r"\left(1,\frac12\right)", "correct"),
    ]
    with VerifierPool(num_workers=2, timeout_s=3.0) as pool:
        pool.warm(["math"])
        verdicts = pool.verify([math_job(answer, gold) for answer, gold, _ in cases])
    assert [verdict.reason for verdict in verdicts] == [reason for *_, reason in cases]
    assert [verdict.reward for verdict in verdicts] == [float(reason == "correct") for *_, reason in cases]


def test_math_verify_in_a_worker_is_stopped_by_its_alarm() -> None:
    prompt = Prompt(1, "p", (1,), "5", "math_verify")
    with VerifierPool(num_workers=1, timeout_s=3.0) as pool:
        verdict = pool.verify([Job("math_verify", r"\boxed{9^{99999999}}", prompt)])[0]
    assert verdict == Verdict(0.0, "timeout")


@pytest.mark.parametrize("inherited", [False, True])
def test_nothing_is_left_when_the_trainer_is_killed(tmp_path: Path, inherited: bool) -> None:
    """Also not where a process that the trainer forked holds all its pipes open."""
    program = tmp_path / "trainer.py"
    notes = tmp_path / "notes"
    notes.mkdir()
    program.write_text(
        "import os, sys, time\n"
        f"sys.path[:] = {sys.path!r}\n"
        "from aer_megatron.rewards.pool import Job, VerifierPool\n"
        "from aer_megatron.types import Prompt\n"
        f"name = '{MODULE}:leave_daemons'\n"
        "pool = VerifierPool(1, 600.0)\n"
        f"pool.verify([Job('{MODULE}:exact', 'x', Prompt(1, 'p', (1,), 'x', name))])\n"
        f"if {inherited} and os.fork() == 0:\n"
        "    time.sleep(300)\n"
        "    os._exit(0)\n"
        f"pool.verify([Job(name, 'hang', Prompt(1, 'p', (1,), {str(notes)!r}, name))])\n",
        encoding="utf-8",
    )
    with subprocess.Popen([sys.executable, str(program)], start_new_session=True) as trainer:
        wait_until(lambda: len(list(notes.iterdir())) == 3)
        pids = [int(note.read_text(encoding="utf-8")) for note in notes.iterdir()]
        assert all(map(is_alive, pids))
        trainer.kill()
        wait_until(lambda: not any(map(is_alive, pids)))
        with suppress(ProcessLookupError):
            os.killpg(trainer.pid, signal.SIGKILL)

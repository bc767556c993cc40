from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from aer_megatron.rewards.pool import Job, VerifierPool
from aer_megatron.types import Prompt, Verdict

MODULE = "tests.support.bad_verifiers"


def job(function: str, text: str = "x", answer: str = "x") -> Job:
    name = f"{MODULE}:{function}"
    return Job(name, text, Prompt(1, "p", (1,), answer, name))


def math_job(answer: str, gold: str) -> Job:
    return Job("math", rf"so \boxed{{{answer}}}", Prompt(1, "p", (1,), gold, "math"))


def worker_pids(pool: VerifierPool) -> list[int]:
    return [worker._process.pid for worker in pool._workers]


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


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
        ("raise_error", "x", Verdict(0.0, "verifier_error:ZeroDivisionError")),
        ("exit_python", "x", Verdict(0.0, "crashed")),
        ("end_process", "die", Verdict(0.0, "crashed")),
        ("kill_self", "x", Verdict(0.0, "crashed")),
        ("nothing", "x", Verdict(0.0, "verifier_error:TypeError")),
        ("not_a_number", "x", Verdict(0.0, "verifier_error:ValueError")),
        ("wrong_type", "x", Verdict(0.0, "verifier_error:TypeError")),
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
        with pytest.raises(RuntimeError, match=r"bad_verifiers:missing.*cannot be loaded.*ValueError"):
            pool.verify([Job(name, "x", Prompt(1, "p", (1,), "x", name))])


def test_math_in_workers_alarms_kills_and_unparseable_answers() -> None:
    cases = [
        (r"\frac{1}{2}", "0.5", "correct"),
        (r"9^{99999999}", "5", "timeout"),
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


def test_workers_end_when_the_trainer_is_killed(tmp_path: Path) -> None:
    program = tmp_path / "trainer.py"
    program.write_text(
        "import sys\n"
        f"sys.path[:] = {sys.path!r}\n"
        "from aer_megatron.rewards.pool import Job, VerifierPool\n"
        "from aer_megatron.types import Prompt\n"
        f"name = '{MODULE}:sleep_forever'\n"
        "pool = VerifierPool(1, 600.0)\n"
        "pool.verify([Job(name, 'x', Prompt(1, 'p', (1,), 'x', name))])\n"
        "print(pool._workers[0]._process.pid, flush=True)\n"
        "pool.verify([Job(name, 'hang', Prompt(1, 'p', (1,), 'x', name))])\n",
        encoding="utf-8",
    )
    with subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        worker = int(trainer.stdout.readline())
        assert is_alive(worker)
        trainer.kill()
    deadline = time.monotonic() + 10.0
    while is_alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(worker)

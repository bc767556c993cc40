"""Ranks under their launcher: exit codes, signals, what a failure does to the others, and one message."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from aer_megatron.launch.rank_processes import RankProcesses
from tests.support.ranks import STOPPING, await_end, await_file, write_program
from tests.support.runs import ROOT

pytestmark = pytest.mark.processes

TIMEOUT_S = 60.0


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Ranks inherit SIGINT ignored from tests that run as a background job."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def launch(folder: Path, text: str, *, ranks: int = 2, patience_s: float = 0.5) -> RankProcesses:
    """Returns started ranks of the program ``text``."""
    (folder / "errors").mkdir()
    processes = RankProcesses(write_program(folder, text), folder / "errors", patience_s)
    variables = {"ROLE_NAME": "aer-launch", "TORCHELASTIC_RUN_ID": "t", "PYTHONPATH": str(ROOT)}
    processes.start({number: os.environ | variables | {"RANK": str(number)} for number in range(ranks)})
    return processes


def wait(processes: RankProcesses) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not processes.all_ended():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def message(processes: RankProcesses) -> str:
    failure = processes.failure()
    assert failure is not None
    return failure.message


def test_ranks_that_are_done(tmp_path: Path) -> None:
    processes = launch(tmp_path, "place('done', repr(sys.argv) + __name__)")
    wait(processes)
    assert (processes.exit_code(), processes.failure(), processes.stop_message()) == (0, None, None)
    assert await_file(tmp_path / "done0") == repr([str(tmp_path / "program.py"), str(tmp_path)]) + "__main__"


@pytest.mark.parametrize(
    ("last", "code", "words"),
    [
        ("raise ValueError('run.seed=-1 is wrong; use 0')", 2, ["run.seed=-1 is wrong; use 0"]),
        ("raise RuntimeError('the server is gone')", 1, ["the server is gone (trace: "]),
        ("raise FileNotFoundError(2, 'no such file', 'a.json')", 1, ["no such file: 'a.json' (trace: "]),
        ("{}['missing']", 1, ["KeyError: 'missing' (trace: "]),
        ("sys.exit(2)", 2, ["rank 1 ended with exit code 2"]),
        ("sys.exit(77)", 77, ["rank 1 ended with exit code 77"]),
        ("sys.exit('no luck')", 1, ["no luck"]),
        ("os._exit(124)", 124, ["rank 1 was ended by its hang watchdog"]),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, ["rank 1 was ended by SIGKILL", "memory"]),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 139, ["rank 1 was ended by SIGSEGV"]),
        ("os.kill(os.getpid(), signal.SIGTERM)", 143, ["rank 1 was ended by SIGTERM"]),  # nobody told it to stop
    ],
)
def test_the_first_failure_gives_message_and_exit_code(tmp_path: Path, last: str, code: int, words: list[str]) -> None:
    """Rank 0 waits in a collective for ever: it is ended."""
    began = time.monotonic()
    processes = launch(tmp_path, f"if rank == '0':\n    time.sleep(600)\n{last}")
    wait(processes)
    assert time.monotonic() - began < TIMEOUT_S / 2
    assert processes.exit_code() == code
    for word in words:
        assert word in message(processes)


def test_what_the_others_make_of_a_failure_is_not_the_message(tmp_path: Path) -> None:
    """A killed rank says nothing, and its peers' complaints come before its end is noticed."""
    text = """
if rank == '1':
    os.kill(os.getpid(), signal.SIGKILL)
raise RuntimeError('Connection closed by peer')
"""
    processes = launch(tmp_path, text)
    time.sleep(1.5)  # a launcher that looks late sees both ends at once
    wait(processes)
    assert processes.exit_code() == 137
    assert "SIGKILL" in message(processes)


def test_a_failure_in_a_rank_that_cannot_end_is_a_failure(tmp_path: Path) -> None:
    text = """
import threading
threading.Thread(target=time.sleep, args=(600,)).start()
raise RuntimeError('a thread keeps this process')
"""
    processes = launch(tmp_path, text, ranks=1)
    wait(processes)
    assert processes.exit_code() == 1
    assert "a thread keeps this process" in message(processes)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 0)], ids=lambda n: str(int(n))
)
def test_a_signal_is_handed_on_once_and_waited_for(tmp_path: Path, number: signal.Signals, code: int) -> None:
    processes = launch(tmp_path, STOPPING)
    with processes.receiving_signals():
        for rank in "01":
            await_file(tmp_path / f"ready{rank}")
        os.kill(os.getpid(), number)
        assert not processes.all_ended()
        for rank in "01":
            assert await_file(tmp_path / f"signal1-{rank}") == str(int(number))
        for _ in range(20):  # longer than the patience with a failure
            assert not processes.all_ended()
            time.sleep(0.05)
        (tmp_path / "step_done").touch()
        wait(processes)
    assert (processes.exit_code(), processes.failure(), processes.stop_message()) == (code, None, None)
    assert not list(tmp_path.glob("signal2-*"))


def test_a_second_signal_is_handed_on_and_a_third_one_kills(tmp_path: Path) -> None:
    text = STOPPING.replace("os._exit(128 + number)", "pass")  # deaf to the second one
    processes = launch(tmp_path, text)
    with processes.receiving_signals():
        for count in (1, 2):
            for rank in "01":
                await_file(tmp_path / (f"ready{rank}" if count == 1 else f"signal1-{rank}"))
            os.kill(os.getpid(), signal.SIGINT)
            assert not processes.all_ended()
        for rank in "01":
            await_file(tmp_path / f"signal2-{rank}")
        os.kill(os.getpid(), signal.SIGINT)
        wait(processes)
    assert processes.exit_code() == 130
    assert processes.failure() is None
    assert "SIGINT" in str(processes.stop_message())


def test_a_second_signal_ends_ranks_that_listen(tmp_path: Path) -> None:
    processes = launch(tmp_path, STOPPING)
    with processes.receiving_signals():
        for name in ("ready", "signal1-"):
            for rank in "01":
                await_file(tmp_path / f"{name}{rank}")
            os.kill(os.getpid(), signal.SIGTERM)
            assert not processes.all_ended()
        wait(processes)
    assert (processes.exit_code(), processes.failure()) == (143, None)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 0)])
def test_a_signal_before_the_ranks_listen(tmp_path: Path, number: signal.Signals, code: int) -> None:
    """It ends the one that does not; the other one, which would wait for it for ever, is ended as well."""
    text = "if rank == '0':\n    place('early'); time.sleep(600)\n" + STOPPING
    processes = launch(tmp_path, text)
    with processes.receiving_signals():
        await_file(tmp_path / "early0")
        await_file(tmp_path / "ready1")
        os.kill(os.getpid(), number)
        wait(processes)
    assert (processes.exit_code(), processes.failure()) == (code, None)
    assert "last checkpoint is lost" in str(processes.stop_message())


def test_a_lost_terminal_ends_nothing(tmp_path: Path) -> None:
    processes = launch(tmp_path, "place('ready')\nwhile not os.path.exists(folder + '/go'): time.sleep(0.02)")
    with processes.receiving_signals():
        await_file(tmp_path / "ready0")
        os.kill(os.getpid(), signal.SIGHUP)
        for _ in range(10):
            assert not processes.all_ended()
            time.sleep(0.02)
        (tmp_path / "go").touch()
        wait(processes)
    assert processes.exit_code() == 0


def test_ranks_have_sessions_of_their_own_and_end_with_their_launcher(tmp_path: Path) -> None:
    """SIGKILL of the launcher, which can do nothing about it any more."""
    program = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from tests.launch.test_rank_processes import launch
launch(Path({str(tmp_path)!r}), "place('ready', str(os.getpid())); time.sleep(600)")
time.sleep(600)
"""
    launcher = subprocess.Popen([sys.executable, "-c", program])
    try:
        pids = [int(await_file(tmp_path / f"ready{rank}")) for rank in "01"]
        assert [os.getsid(pid) for pid in pids] == pids
    finally:
        launcher.kill()
        launcher.wait()
    for pid in pids:
        await_end(pid)


def test_a_rank_whose_launcher_ended_before_it_asked_the_kernel_ends(tmp_path: Path) -> None:
    program = write_program(tmp_path, "place('ran')")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    rank = subprocess.run(
        [sys.executable, "-m", "aer_megatron.launch.rank_main", str(ended.pid), *program],
        env=os.environ | {"RANK": "0"}, cwd=ROOT, check=False, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert rank.returncode == -signal.SIGKILL
    assert not (tmp_path / "ran0").exists()


def test_a_killed_rank_leaves_nothing_of_its_group(tmp_path: Path) -> None:
    text = """
import subprocess
place('child', str(subprocess.Popen(['sleep', '600']).pid))
os.kill(os.getpid(), signal.SIGKILL)
"""
    processes = launch(tmp_path, text, ranks=1)
    wait(processes)
    await_end(int((tmp_path / "child0").read_text()))


def test_an_interrupt_while_a_rank_starts_prints_no_trace(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    processes = launch(tmp_path, "time.sleep(600)")
    with processes.receiving_signals():
        os.kill(os.getpid(), signal.SIGINT)
        wait(processes)
    assert processes.exit_code() == 130
    assert "Traceback" not in capfd.readouterr().err


def test_what_is_handed_over_is_bounded_and_checked(tmp_path: Path) -> None:
    text = """
import json
path = os.environ['TORCHELASTIC_ERROR_FILE']
long = json.dumps({'message': {'message': 'x' * 100000, 'extraInfo': {}}})
bad = {'0': '[' * 50000, '1': long, '2': '{"message": 3}'}
open(path, 'w').write(bad[rank])
sys.exit(5)
"""
    processes = launch(tmp_path, text, ranks=3)
    wait(processes)
    assert processes.exit_code() == 5
    assert "ended with exit code 5" in message(processes)

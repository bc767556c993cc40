"""``aer launch`` itself: what is open to others, one message at the end, exit codes, and ranks that end with it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.ranks import STOPPING, await_end, await_file, write_program
from tests.support.runs import ROOT, environment, random_base, run_command, write_run_file
from tests.support.signalled_runs import num_lines

pytestmark = pytest.mark.integration

LAUNCH = [sys.executable, "-m", "aer_megatron.cli", "launch"]
TIMEOUT_S = 120.0
# a process group over gloo: the sockets of the store and of the ranks are open while it lives
JOINED = """
from aer_megatron.parallel.platform import initialize_process_group, install_platform
import torch
initialize_process_group(install_platform())
torch.distributed.barrier()
place("ready", str(os.getpid()))
time.sleep(600)
"""


def start(folder: Path, text: str, *options: str) -> subprocess.Popen[str]:
    """Returns the launcher of two ranks of a program; its output goes to a pipe."""
    return subprocess.Popen(
        [*LAUNCH, "--nproc", "2", *options, *write_program(folder, text)],
        env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def listening(pid: int) -> list[str]:
    """Returns the local addresses, in hexadecimal, on which process ``pid`` listens for TCP connections."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            inodes.add(os.readlink(link).removeprefix("socket:[").removesuffix("]"))
        except OSError:  # closed meanwhile
            continue
    rows = [row.split() for name in ("tcp", "tcp6") for row in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()]
    return [row[1].split(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes]


def is_loopback(address: str) -> bool:
    packed = b"".join(bytes.fromhex(address[place : place + 8])[::-1] for place in range(0, len(address), 8))
    if len(packed) == 4:
        return packed[0] == 127
    return packed == socket.inet_pton(socket.AF_INET6, "::1") or packed.startswith(b"\0" * 10 + b"\xff\xff\x7f")


def test_one_machine_is_open_to_nobody_and_its_ranks_end_with_the_launcher(tmp_path: Path) -> None:
    launcher = start(tmp_path, JOINED)
    try:
        ranks = [int(await_file(tmp_path / f"ready{rank}", TIMEOUT_S)) for rank in "01"]
        open_at = {pid: listening(pid) for pid in (launcher.pid, *ranks)}
        assert open_at[launcher.pid], "the store listens in the launcher"
        for addresses in open_at.values():
            assert all(map(is_loopback, addresses)), open_at
    finally:
        launcher.kill()
        launcher.communicate()
    for pid in ranks:
        await_end(pid)


def test_a_signal_ends_the_launch_with_the_ranks_code(tmp_path: Path) -> None:
    launcher = start(tmp_path, STOPPING)
    try:
        for rank in "01":
            await_file(tmp_path / f"ready{rank}", TIMEOUT_S)
        launcher.send_signal(signal.SIGTERM)
        for rank in "01":
            await_file(tmp_path / f"signal1-{rank}")
        (tmp_path / "step_done").touch()
        assert launcher.wait(TIMEOUT_S) == 143
        assert launcher.communicate() == ("", "")
        assert not list(tmp_path.glob("signal2-*"))
    finally:
        launcher.kill()


def test_a_wrong_configuration_is_one_line_the_last_one(tmp_path: Path) -> None:
    """With the launcher of the quick start's script, and all ranks refusing alike."""
    assert "-m aer_megatron.cli launch --nproc 2" in (ROOT / "examples/quickstart/run.sh").read_text()
    output = f"--run.output_dir={tmp_path}/out"
    done = run_command([*LAUNCH, "--nproc", "2", "examples/quickstart/countdown.toml", "--parallel.tp=3", output])
    assert done.returncode == 2
    said = done.stderr.splitlines()
    assert len(said) == 1
    assert said[0].startswith("aer_megatron: parallel.tp=3 ")
    assert not (tmp_path / "out").exists()


def test_a_failure_of_one_rank_is_one_line_with_its_trace_in_the_run_s_folder(tmp_path: Path) -> None:
    """Rank 1 fails while rank 0 waits for it."""
    run_file = write_run_file(tmp_path)
    text = f"""
from aer_megatron import train
def fail(*arguments):
    import torch
    if rank == "0":
        torch.distributed.barrier()
    raise RuntimeError("no weights here" + chr(10) + "Exception raised from a.cpp:1" + chr(10) + "frame #0")
import aer_megatron.compose.common
aer_megatron.compose.common.check_model = fail
sys.exit(train.main([{str(run_file)!r}]))
"""
    launcher = start(tmp_path, text)
    out, err = launcher.communicate(timeout=TIMEOUT_S)
    assert launcher.returncode == 1, err
    last = err.splitlines()[-1]
    assert last.startswith("aer_megatron: no weights here (trace: ")
    assert err.count("no weights here") == 1
    assert "Traceback" not in out + err and "frame #0" not in out + err
    trace = Path(last.partition("(trace: ")[2].removesuffix(")"))
    assert trace.parent == tmp_path / "out" / "logs" and "rank1" in trace.name
    assert "Traceback" in trace.read_text() and "frame #0" in trace.read_text()
    assert trace.stat().st_mode & 0o777 == 0o600


def test_several_machines_use_one_address_and_give_the_ranks_their_numbers(tmp_path: Path) -> None:
    """Two launchers with one address of the loopback between them; nothing else listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.3", 0))
        port = probe.getsockname()[1]
    machines = ["--nnodes=2", "--master-addr=127.0.0.3", f"--master-port={port}", "--join-timeout=60"]
    text = """
place('ready', os.environ['LOCAL_RANK'] + os.environ['WORLD_SIZE'])
while not os.path.exists(folder + '/go'):
    time.sleep(0.05)
"""
    second = start(tmp_path, text, *machines, "--node-rank=1")  # it may come first
    time.sleep(0.5)
    first = start(tmp_path, text, *machines, "--node-rank=0")
    try:
        assert [await_file(tmp_path / f"ready{rank}", TIMEOUT_S) for rank in "0123"] == ["04", "14", "04", "14"]
        assert set(listening(first.pid)) == {"0300007F"}
        assert listening(second.pid) == []
        (tmp_path / "go").touch()
        assert (first.wait(TIMEOUT_S), second.wait(TIMEOUT_S)) == (0, 0)
    finally:
        for launcher in (first, second):
            launcher.kill()
            launcher.communicate()


def test_a_run_that_is_stopped_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """Ctrl-C reaches the launcher alone; a scheduler's SIGTERM reaches launcher and ranks, and counts once."""
    random_base(tmp_path / "base")
    options = ["--run.num_steps=12", "--run.checkpoint_every=0", "--eval.sets={}", "--parallel.tp=2"]
    command = [*LAUNCH, "--nproc", "2", str(write_run_file(tmp_path)), *options]
    metrics = tmp_path / "out" / "metrics.jsonl"
    done = 0
    for number, everyone, code in ((signal.SIGINT, False, 130), (signal.SIGTERM, True, 143)):
        launcher = subprocess.Popen(
            command, env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            deadline = time.monotonic() + 2 * TIMEOUT_S
            while num_lines(metrics) < done + 2:
                assert launcher.poll() is None and time.monotonic() < deadline
                time.sleep(0.02)
            children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
            for pid in [launcher.pid, *(map(int, children) if everyone else ())]:
                os.kill(pid, number)
            out, err = launcher.communicate(timeout=2 * TIMEOUT_S)
        finally:
            launcher.kill()
        assert launcher.returncode == code, out + err
        done = num_lines(metrics)
        assert done < 12
        saved = f"saved {tmp_path}/out/checkpoints/step_{done:08d}; the same command goes on at step {done}"
        assert (out + err).count(f"{number.name}: {saved}") == 1
        assert "Traceback" not in out + err and "aer_megatron:" not in err

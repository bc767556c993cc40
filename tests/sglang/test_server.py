"""Launched servers: ready, watched, restarted with the right weights, and gone without a trace whatever happens."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from aer_megatron.sglang.guard import KEY_FILE
from aer_megatron.sglang.server import LaunchOptions, ServerGroup, command_line
from aer_megatron.sglang.start_server import KEY_FILE_OPTION
from aer_megatron.sglang.supervisor import Supervisor
from tests.support.real_servers import processes_writing
from tests.support.runs import ROOT
from tests.support.sglang_fixtures import OPTIONS, requests, rollouts, weights

pytestmark = pytest.mark.processes

DOUBLE = ROOT / "tests" / "support" / "sglang_double.py"


def double_command(options: LaunchOptions, port: int) -> list[str]:
    arguments = ["--model-path", options.model_path, "--host", options.host, "--port", str(port)]
    return [options.python, str(DOUBLE), *arguments, "--token-s", "0.02"]


def launch_options(model: Path, logs: Path, **given: object) -> LaunchOptions:
    values: dict[str, object] = {
        "python": sys.executable,
        "model_path": str(model),
        "host": "127.0.0.1",
        "arguments": {},
        "environment": {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        "log_folder": logs,
        "start_timeout_s": 60.0,
        "max_restarts": 2,
        "api_key": None,
        "reached_at": "",
    }
    return LaunchOptions(**{**values, **given})  # type: ignore[arg-type]


def processes_of(port: int) -> list[int]:
    """Returns the processes with the port on their command line, guards included."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if str(port).encode() in command:
                found.append(int(entry.name))
    return found


def wait_until(condition: Callable[[], object], seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def group(folder: Path, tmp_path: Path) -> Iterator[ServerGroup]:
    with ServerGroup(2, launch_options(folder, tmp_path / "logs"), command=double_command) as made:
        made.start()
        yield made


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


def test_options_become_flags() -> None:
    options = launch_options(
        Path("m"), Path("l"), arguments={"mem_fraction_static": 0.5, "skip_x": True, "no_y": False, "many": [1, 2]}
    )
    tail = command_line(options, 7)[3:]
    assert tail == [
        *("--model-path", "m", "--host", "127.0.0.1", "--port", "7"),
        *("--mem-fraction-static", "0.5", "--skip-x", "--many", "1", "2"),
    ]


def test_the_api_key_goes_to_the_server_and_not_to_a_command_line_or_a_log(folder: Path, tmp_path: Path) -> None:
    """Through the starter of real servers; the stand-in prints its arguments, as the real one does, and logs them."""
    program = tmp_path / "stand_in.py"
    program.write_text(
        "import logging, os, subprocess, sys\n"
        "logging.basicConfig(level=logging.INFO, force=True)\n"
        "print(f'server_args={sys.argv}', flush=True)\n"
        "logging.getLogger('x').info('server_args=%s', sys.argv)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "from tests.support.sglang_double import main\n"
        "main()\n"
    )

    def command(options: LaunchOptions, port: int) -> list[str]:
        words = command_line(options, port)
        return [word if word != "sglang.launch_server" else "stand_in" for word in words]

    options = launch_options(folder, tmp_path / "logs", api_key="open-sesame")
    environment = {**options.environment, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "TMPDIR": str(tmp_path)}
    options = replace(options, environment=environment)
    with ServerGroup(1, options, command=command) as made:
        urls = made.start()
        with rollouts(urls, folder, api_key="open-sesame") as client:
            assert client.fleet.control(0, "/model_info").status == 200
        with rollouts(urls, folder) as client:
            assert client.fleet.control(0, "/model_info").status == 401
        processes = processes_writing(tmp_path / "logs")
        assert len(processes) == 3
        for process in processes:
            for file in ("cmdline", "environ"):
                assert b"sesame" not in Path(f"/proc/{process}/{file}").read_bytes()
        left = [path for path in tmp_path.rglob("*") if path.is_file() and "model" not in path.parts]
        assert not any(b"sesame" in path.read_bytes() for path in left)
    log = (tmp_path / "logs" / "server-0.log").read_text()
    assert log.count("'--api-key=***'") == 2


def test_a_key_lies_in_a_file_of_its_user_until_it_is_read(tmp_path: Path) -> None:
    """A server that ends before it reads the key leaves nothing."""
    program = (
        "import os, sys\n"
        "for path in (sys.argv[2], os.path.dirname(sys.argv[2])):\n"
        "    print(oct(os.stat(path).st_mode), end=' ')\n"
    )

    def command(options: LaunchOptions, port: int) -> list[str]:
        return [sys.executable, "-c", program, KEY_FILE_OPTION, KEY_FILE]

    options = launch_options(tmp_path, tmp_path / "logs", api_key="open-sesame")
    options = replace(options, environment={**options.environment, "TMPDIR": str(tmp_path)})
    with ServerGroup(1, options, command=command) as made, pytest.raises(RuntimeError, match="0o100600 0o40700"):
        made.start()
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]


def test_a_killed_server_is_restored_before_it_serves_and_no_completion_is_lost(
    group: ServerGroup, folder: Path
) -> None:
    with Supervisor(group) as supervisor, rollouts(group.urls, folder, recovery_timeout_s=60.0) as made:
        made.sync.publish(iter(weights(7).items()), 5)
        supervisor.watch(made.sync)
        victim = processes_of(port_of(group.urls[0]))
        for process in victim:
            os.kill(process, signal.SIGKILL)
        completions = made.engine.generate(requests(40), OPTIONS)
        assert len(completions) == 40
        assert all(span.version == 5 for completion in completions for span in completion.policy_versions)
        # a later step finds it again: restarted, restored, verified
        assert wait_until(lambda: made.engine.generate(requests(8), OPTIONS) and made.fleet.in_service() == [0, 1], 60)
        assert made.fleet.control(0, "/model_info").json()["weight_version"] == made.labels.verified(5)
        assert not set(victim) & set(processes_of(port_of(group.urls[0])))


def test_nothing_is_left_after_the_end(folder: Path, tmp_path: Path) -> None:
    with ServerGroup(2, launch_options(folder, tmp_path / "logs"), command=double_command) as made:
        urls = made.start()
        ports = [port_of(url) for url in urls]
        assert all(is_listening(port) and len(processes_of(port)) == 2 for port in ports)  # guard and server
    assert not any(is_listening(port) or processes_of(port) for port in ports)
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["server-0.log", "server-1.log"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_when_the_trainer_is_killed(number: signal.Signals, folder: Path, tmp_path: Path) -> None:
    """A process that launched servers dies of a signal: its servers follow."""
    program = (
        "import os, signal, sys, time, pathlib\n"
        "from aer_megatron.sglang.server import LaunchOptions, ServerGroup\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job inherits it ignored
        "model, logs, double = sys.argv[1:]\n"
        "logs = pathlib.Path(logs)\n"
        "options = LaunchOptions(sys.executable, model, '127.0.0.1', {}, os.environ, logs, 60.0, 0, None, '')\n"
        "def command(options, port):\n"
        "    return [sys.executable, double, '--model-path', model, '--host', options.host, '--port', str(port)]\n"
        "with ServerGroup(1, options, command=command) as made:\n"
        "    print(made.start()[0], flush=True)\n"
        "    time.sleep(600)\n"
    )
    trainer = subprocess.Popen(
        [sys.executable, "-c", program, str(folder), str(tmp_path / "logs"), str(DOUBLE)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    assert trainer.stdout is not None
    port = port_of(trainer.stdout.readline().strip())
    assert is_listening(port)
    os.killpg(trainer.pid, number)  # as a terminal or a launcher would
    trainer.wait(30)
    trainer.stdout.close()
    assert wait_until(lambda: not processes_of(port))
    assert not is_listening(port)


def test_a_server_that_ends_while_it_starts_is_explained_by_its_log(folder: Path, tmp_path: Path) -> None:
    def broken(options: LaunchOptions, port: int) -> list[str]:
        return [sys.executable, "-c", "print('no such device'); raise SystemExit(3)"]

    with (
        ServerGroup(1, launch_options(folder, tmp_path / "logs"), command=broken) as made,
        pytest.raises(RuntimeError, match=r"(?s)server 0 ended while it started.*no such device"),
    ):
        made.start()


def test_a_server_that_is_never_ready_is_given_up(folder: Path, tmp_path: Path) -> None:
    def deaf(options: LaunchOptions, port: int) -> list[str]:
        return [sys.executable, "-c", f"import time; {port}; time.sleep(600)", str(port)]

    options = launch_options(folder, tmp_path / "logs", start_timeout_s=0.5)
    with (
        ServerGroup(1, options, command=deaf) as made,
        pytest.raises(RuntimeError, match=r"not ready after sglang.start_timeout_s=0.5"),
    ):
        made.start()
    assert processes_of(port_of(made.urls[0])) == []

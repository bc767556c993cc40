"""SGLang servers that this run starts and ends; ``supervisor.py`` watches them.

A server's processes belong to a group of their own under a guard (``sglang/guard.py``), which ends them when this
process closes its lifeline or dies in any way.

This file does NOT talk to servers beyond their readiness, and reads no environment: it is given one.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Self
from urllib.parse import urlsplit

from aer_megatron.sglang.addresses import HeldPort, in_url
from aer_megatron.sglang.guard import KEY_FILE
from aer_megatron.sglang.start_server import KEY_FILE_OPTION

_LOG = logging.getLogger(__name__)
_GUARD = Path(__file__).with_name("guard.py")
_STARTER = Path(__file__).with_name("start_server.py")
_MODULE = "sglang.launch_server"
POLL_S = 0.25  # between two looks at a process
_READY_TIMEOUT_S = 5.0
_READY_BYTES = 1 << 16  # of an answer that nobody reads
_END_TIMEOUT_S = 15.0  # of a guard, beyond its own grace
_LOG_TAIL_BYTES = 3000


@dataclass(frozen=True, slots=True)
class LaunchOptions:
    """What every server of a run is started with; the values live in the configuration's [sglang] section.

    Example: ``LaunchOptions("venv/bin/python", "model", "127.0.0.1", {"device": "cpu"}, ...)``
    """

    python: str
    model_path: str
    host: str  # to listen on
    arguments: Mapping[str, Any]
    environment: Mapping[str, str]  # complete
    log_folder: Path
    start_timeout_s: float
    max_restarts: int  # of one server
    api_key: str | None = field(repr=False)  # asked of every client
    reached_at: str  # host in the addresses that clients are given; "" = ``host``


def command_line(options: LaunchOptions, port: int) -> list[str]:
    """Returns the server's command, which holds no secret: the key is in a file that the guard makes.

    ``arguments`` become flags: underscores to dashes, true = the flag alone, false = left out, a list = several values.
    """
    start = [str(_STARTER), _MODULE, KEY_FILE_OPTION, KEY_FILE] if options.api_key else ["-m", _MODULE]
    command = [options.python, *start, "--model-path", options.model_path]
    command += ["--host", options.host, "--port", str(port)]
    for name, value in options.arguments.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            command.append(flag)
        elif isinstance(value, (list, tuple)):
            command += [flag, *(str(item) for item in value)]
        elif value is not False:
            command += [flag, str(value)]
    return command


class ServerProcess:
    """One server: its guard process, address and log file."""

    def __init__(self, index: int, options: LaunchOptions, command: Callable[[LaunchOptions, int], list[str]]) -> None:
        self._options = options
        self._command = command
        self._held = HeldPort(options.host)
        self.port = self._held.number
        self.url = f"http://{in_url(options.reached_at or options.host)}:{self.port}"
        self.log_file = options.log_folder / f"server-{index}.log"
        self._guard: subprocess.Popen[bytes] | None = None

    @property
    def is_alive(self) -> bool:
        """Returns whether the server's main process runs."""
        return self._guard is not None and self._guard.poll() is None

    def start(self) -> None:
        """Starts the server; raises RuntimeError where its interpreter cannot be run."""
        self._options.log_folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(_GUARD), *self._command(self._options, self.port)]
        log: IO[bytes]
        with self.log_file.open("ab") as log:
            log.write((" ".join(command[2:]) + "\n").encode())
            log.flush()
            self._guard = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                bufsize=0,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(self._options.environment),
                start_new_session=True,  # Ctrl-C goes to the trainer, which then ends its servers
            )
        assert self._guard.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended already: ``is_alive`` says so
            self._guard.stdin.write(f"{self._options.api_key or ''}\n".encode("ascii"))

    def close(self) -> None:
        """Ends the server and gives its port up."""
        self.stop()
        self._held.release()

    def stop(self) -> None:
        """Ends the server and waits until no process of it is left."""
        guard, self._guard = self._guard, None
        if guard is None:
            return
        assert guard.stdin is not None
        guard.stdin.close()
        try:
            guard.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            guard.kill()
            guard.wait()

    def is_ready(self) -> bool:
        """Returns whether the server answers and has generated a first token."""
        address = urlsplit(self.url)
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=_READY_TIMEOUT_S)
        key = self._options.api_key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            for path in ("/ready", "/health"):  # /ready came with 0.5.20
                connection.request("GET", path, headers=headers)
                reply = connection.getresponse()
                reply.read(_READY_BYTES)
                if reply.status != 404:
                    return reply.status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
        return False

    def await_ready(self, deadline: float, closing: threading.Event) -> str:
        """Waits until the server is ready; returns what went wrong, or nothing."""
        while not self.is_ready():
            if not self.is_alive:
                return "ended while it started"
            if time.monotonic() > deadline:
                return f"is not ready after sglang.start_timeout_s={self._options.start_timeout_s:g}"
            if closing.wait(POLL_S):
                return "is being ended"
        return ""

    def log_tail(self) -> str:
        """Returns the end of the log."""
        with self.log_file.open("rb") as log:
            log.seek(max(0, self.log_file.stat().st_size - _LOG_TAIL_BYTES))
            return log.read().decode("utf-8", "replace")


class ServerGroup:
    """The servers of a run, on the rank that started them; a ``with`` block ends them whatever happens.

    Args:
        num_servers: started together.
        options: of every server.
        command: (options, port) -> command line.
    """

    def __init__(
        self,
        num_servers: int,
        options: LaunchOptions,
        *,
        command: Callable[[LaunchOptions, int], list[str]] = command_line,
    ) -> None:
        self.options = options
        self.processes = [ServerProcess(index, options, command) for index in range(num_servers)]
        self.to_replace: set[int] = set()  # alive, but not to be trusted
        self.closing = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def urls(self) -> list[str]:
        """Returns the servers' addresses, which a restart keeps."""
        return [process.url for process in self.processes]

    def start(self) -> list[str]:
        """Starts all servers, waits until they are ready, and returns their addresses.

        Raises:
            RuntimeError: one ended or is not ready within ``start_timeout_s``; the message ends with its log's end.
        """
        for process in self.processes:
            process.start()
        deadline = time.monotonic() + self.options.start_timeout_s
        for index, process in enumerate(self.processes):
            failure = process.await_ready(deadline, self.closing)
            if failure:
                raise RuntimeError(
                    f"sglang server {index} {failure}; the end of {process.log_file}:\n{process.log_tail()}"
                )
        return self.urls

    def replace(self, index: int) -> None:
        """Has the supervisor restart a server that is alive, soon."""
        self.to_replace.add(index)

    def close(self) -> None:
        """Ends all servers and waits until no process of them is left; calling it twice is harmless."""
        self.closing.set()
        for process in self.processes:
            process.close()

"""Serves the report of runs that go on, on the loopback interface alone: ``aer report RUN --serve``.

There are two addresses, the page and the state by which an open page sees that it is old; no file can be asked for.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from aer_megatron.report.html import page, policy
from aer_megatron.report.writer import METRICS_FILE

HOST = "127.0.0.1"


class ReportServer(ThreadingHTTPServer):
    """Answers with the page of ``run_folders``, drawn anew when a metrics.jsonl has changed."""

    daemon_threads = True

    def __init__(self, run_folders: Sequence[Path], port: int) -> None:
        """Raises OSError where the port is taken; port 0 takes a free one."""
        self._folders = list(run_folders)
        self._lock = threading.Lock()  # one drawing at a time
        self._drawn: tuple[str, str] = ("", "")
        super().__init__((HOST, port), _Handler)

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.server_port}/"

    def state(self) -> str:
        """Returns a text that changes when a run has made a step."""
        text = "".join(
            f"{(stat := (each / METRICS_FILE).stat()).st_size} {stat.st_mtime_ns} " for each in self._folders
        )
        return hashlib.sha256(text.encode()).hexdigest()

    def page(self) -> tuple[str, str]:
        """Returns (state, text) of the page; raises ValueError as ``html.page``."""
        with self._lock:
            state = self.state()
            if self._drawn[0] != state:
                self._drawn = state, page(self._folders)
            return self._drawn


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer
    timeout = 10

    def do_GET(self) -> None:
        # a page of another site may resolve its own name to this machine: its name gives it away
        if self.headers.get("Host", "").rsplit(":", 1)[0] not in (HOST, "localhost"):
            self._answer(HTTPStatus.FORBIDDEN, "text/plain", "ask by 127.0.0.1")
            return
        try:
            if self.path == "/":
                state, text = self.server.page()
                self._answer(HTTPStatus.OK, "text/html", text, state)
            elif self.path == "/state":
                self._answer(HTTPStatus.OK, "text/plain", self.server.state())
            else:
                self._answer(HTTPStatus.NOT_FOUND, "text/plain", "there is only /")
        except (ValueError, OSError) as error:
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", str(error))

    def _answer(self, status: HTTPStatus, kind: str, text: str, state: str = "") -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", f"{policy()}; frame-ancestors 'none'")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        if state:
            self.send_header("ETag", f'"{state}"')
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: a request every few seconds is no news."""

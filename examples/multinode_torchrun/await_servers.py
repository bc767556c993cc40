"""Returns once every SGLang server answers that it is healthy: python await_servers.py TIMEOUT_S URL [URL ...]

Exit code 1 and the first address that is not up, where the time is over. What answers is not trusted: the call goes to
that address alone (no proxy of the environment, no redirect), and only its status line is read, within a few seconds.
Standard library only.
"""

from __future__ import annotations

import re
import socket
import ssl
import sys
import time
from urllib.parse import urlsplit

_CALL_S = 5.0
_STATUS_BYTES = 12  # of "HTTP/1.1 200"
_HEALTHY = re.compile(rb"HTTP/1\.[01] 200")


def address_of(url: str) -> tuple[str, str, int]:
    """Returns scheme, host and port; raises ValueError for what is no address of a server."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is no address of a server; write http://HOST:PORT, or http://[::1]:PORT")
    return parts.scheme, parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)


def is_healthy(url: str) -> bool:
    """Returns whether the server at ``url`` takes requests."""
    scheme, host, port = address_of(url)
    path = f"{urlsplit(url).path.rstrip('/')}/health"
    deadline = time.monotonic() + _CALL_S
    answer = b""
    try:
        with socket.create_connection((host, port), timeout=_CALL_S) as plain:
            connection = plain
            if scheme == "https":
                connection = ssl.create_default_context().wrap_socket(plain, server_hostname=host)
            request = f"GET {path} HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\nConnection: close\r\n\r\n"
            connection.sendall(request.encode("ascii"))
            while len(answer) < _STATUS_BYTES and (left := deadline - time.monotonic()) > 0:
                connection.settimeout(left)
                piece = connection.recv(_STATUS_BYTES - len(answer))
                if not piece:
                    break
                answer += piece
    except (OSError, UnicodeError):  # refused, too slow, no such host, no certificate
        return False
    return _HEALTHY.fullmatch(answer) is not None


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    if len(arguments) < 2:
        print("usage: await_servers.py TIMEOUT_S URL [URL ...]", file=sys.stderr)
        return 2
    try:
        deadline = time.monotonic() + float(arguments[0])
        for url in arguments[1:]:
            address_of(url)
    except ValueError as error:
        print(f"await_servers: {error}", file=sys.stderr)
        return 2
    for url in arguments[1:]:
        while not is_healthy(url):
            if time.monotonic() > deadline:
                print(f"await_servers: {url} is not healthy after {arguments[0]} s; see its log", file=sys.stderr)
                return 1
            time.sleep(0.5)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Addresses of servers: which are right, which are this machine's own, and ports that nobody else takes meanwhile."""

from __future__ import annotations

import ipaddress
import logging
import resource
import socket
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

_LOG = logging.getLogger(__name__)
_NO_PROXY = ("no_proxy", "NO_PROXY")
_LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")
_UNKNOWN = (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))


def server_url(option: str, url: str) -> str:
    """Returns an address as it is used: without a slash at its end.

    Raises:
        ValueError: it is no address of a server; the message names ``option``.
    """
    if "@" in url:  # what stands before it would be shown in messages, and in run.json
        raise ValueError(f"{option}: an address holds a user or a password; leave it out, and use sglang.api_key_env")
    what = f"{option}: {url!r}"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"{what} is no address ({error}); write http://HOST:PORT, or http://[::1]:PORT") from None
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"{what} must start with http:// or https://")
    if not host or port == 0 or (":" in parts.netloc.rpartition(":")[0] and "[" not in parts.netloc):
        raise ValueError(f"{what} names no host and port; write http://HOST:PORT, or http://[::1]:PORT")
    if parts.query or parts.fragment:
        raise ValueError(f"{what} has a query; write http://HOST:PORT")
    return url.rstrip("/")


def check_resolves(option: str, url: str) -> None:
    """Raises ValueError for the address of a host that does not exist, as far as the resolver can tell now."""
    host = urlsplit(url).hostname or ""
    try:
        socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        if isinstance(error, socket.gaierror) and error.errno not in _UNKNOWN:
            return  # the resolver is not there now: calls to the server will be repeated
        raise ValueError(
            f"{option}: the host {host!r} of {url!r} does not resolve ({error}); correct its name, or give an address"
        ) from None


def in_url(host: str) -> str:
    """Returns a host as it stands in an address: "[::1]" of "::1"."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def is_loopback(host: str) -> bool:
    """Returns whether a host, by name or number, is reached from this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def without_proxies(environment: Mapping[str, str], hosts: Sequence[str]) -> dict[str, str]:
    """Returns the environment with the given hosts and this machine's own exempt from its proxies.

    A server asks its own address over HTTP before it is ready, with a client that obeys them.
    """
    present = ",".join(environment[name] for name in _NO_PROXY if environment.get(name))
    words = [word.strip() for word in present.split(",") if word.strip()]
    own = [*_LOOPBACK, *(word for host in hosts for word in (host.strip("[]"), in_url(host)))]
    merged = ",".join(dict.fromkeys([*words, *own]))
    return {**environment, **dict.fromkeys(_NO_PROXY, merged)}


def allow_open_files(wanted: int) -> None:
    """Raises this process's soft limit of open files to ``wanted``; a warning where its hard limit is lower."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if allowed < wanted:
        _LOG.warning(
            "connections to the servers may need %d open files, and this process may have %d; raise the hard limit "
            "(ulimit -Hn), or lower sglang.max_concurrency",
            wanted,
            allowed,
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


class HeldPort:
    """A port of this machine that is this process's until ``release``; another one may listen there all the same.

    It is bound but never listened on, and shared by SO_REUSEADDR, which servers set: they can take it, while nobody who
    asks the system for a free port is given it, also while a server is being restarted.

    Raises:
        ValueError: ``host`` is no address of this machine.
    """

    def __init__(self, host: str) -> None:
        try:
            family, _, _, _, address = socket.getaddrinfo(host.strip("[]"), 0, type=socket.SOCK_STREAM)[0]
            self._socket = socket.socket(family, socket.SOCK_STREAM)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind(address)
        except (OSError, UnicodeError) as error:
            raise ValueError(
                f"sglang.host={host!r} is no address that servers of this machine can listen on ({error}); use "
                '"127.0.0.1", or the address by which the other nodes reach this one'
            ) from None
        self.number: int = self._socket.getsockname()[1]

    def release(self) -> None:
        """Lets anybody have the port; twice is harmless."""
        self._socket.close()

"""The servers that a rank talks to: which are in service, how busy they are, and the HTTP calls to them.

One event loop in a thread of its own serves all requests of this process over reused connections; the public methods
are synchronous. ``serve`` puts servers into service with a policy version that was verified on them; a server that
fails is retired with a reason, and with what may bring it back:
    probe     it answers and still carries the verified version (it was unreachable, or a supervisor restored it)
    transfer  the next weight transfer to it is verified (it hung, or failed again and again)
    restart   it runs in a new process (it answered garbage)

This file does NOT know what the calls mean, and starts no processes.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import logging
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self, TypeVar

import aiohttp

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")
_KEEPALIVE_S = 4.0  # below uvicorn's 5 s: the client closes an idle connection before the server does
_CLOSE_TIMEOUT_S = 10.0


Comeback = Literal["probe", "transfer", "restart"]


class Reply(NamedTuple):
    """An HTTP status and the body as it came."""

    status: int
    body: bytes

    def json(self) -> Any:
        """Returns the decoded body, None where it is not JSON."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None

    @property
    def text(self) -> str:
        """The message of an error reply, shortened."""
        table = self.json()
        for key in ("message", "error", "detail"):
            if isinstance(table, Mapping) and table.get(key):
                inner = table[key]
                return str(inner.get("message", inner) if isinstance(inner, Mapping) else inner)[:500]
        return self.body.decode("utf-8", "replace")[:500]


@dataclass(slots=True)
class Server:
    """What this rank knows of one server."""

    index: int
    url: str
    in_service: bool = False
    reason: str = "no weights were transferred yet"  # why it is not in service
    comeback: Comeback = "transfer"
    in_flight: int = 0
    num_failures: int = 0  # in a row


@dataclass(frozen=True, slots=True)
class FleetOptions:
    """Limits of the calls; the values live in the configuration's [sglang] section."""

    max_concurrency: int  # /generate calls per server and rank
    connect_timeout_s: float
    control_timeout_s: float
    api_key: str | None = field(repr=False)


class ServerFleet:
    """HTTP access to servers and the record of who is in service.

    Args:
        urls: base addresses, ``http://host:port``.
        options: limits.

    Raises:
        ValueError: no url, or one that is not http(s).
    """

    def __init__(self, urls: Sequence[str], options: FleetOptions) -> None:
        if not urls:
            raise ValueError("sglang.urls is empty; name a server, or launch some with sglang.num_servers")
        for url in urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"sglang.urls: {url!r} must start with http:// or https://")
        self.servers = [Server(index, url.rstrip("/")) for index, url in enumerate(urls)]
        self.options = options
        self.policy_version = -1
        self.in_transfer = False
        # ends the calls under way before weights are transferred; set by who makes them
        self.interrupt: Callable[[], Coroutine[Any, Any, None]] | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sglang-http", daemon=True)
        self._thread.start()
        self._changed: asyncio.Future[None] = self._loop.create_future()
        self._session: aiohttp.ClientSession | None = None
        self._background: set[asyncio.Task[Any]] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- for other threads ------------------------------------------------------------------------------------------

    def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Returns what ``coroutine`` returns on the fleet's loop; an interrupt cancels it and waits for its end."""
        if self._loop.is_closed():
            coroutine.close()
            raise RuntimeError("the connection to the rollout servers is closed")
        ended = threading.Event()

        async def watched() -> _T:
            try:
                return await coroutine
            finally:
                ended.set()

        future = asyncio.run_coroutine_threadsafe(watched(), self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise RuntimeError("the connection to the rollout servers is closed") from None
        except BaseException:
            future.cancel()
            ended.wait(_CLOSE_TIMEOUT_S)
            raise

    def control(
        self, index: int, path: str, body: Mapping[str, Any] | None = None, *, timeout_s: float | None = None
    ) -> Reply:
        """Returns the reply of a control call: POST with a JSON body, GET without one.

        Raises:
            RuntimeError: no whole reply came, naming server, path and cause.
        """
        url = self.servers[index].url
        limit = self.options.control_timeout_s if timeout_s is None else timeout_s
        try:
            return self.run(self.call(index, path, body, timeout_s=limit))
        except (aiohttp.ClientError, OSError) as error:
            cause = f"no reply within {limit:g} s" if isinstance(error, TimeoutError) else describe(error)
            raise RuntimeError(f"server {index} ({url}): {path} failed: {cause}") from None

    def serve(self, version: int, refused: Mapping[int, str]) -> None:
        """Puts every server into service with policy ``version`` but those of ``refused`` (index -> reason)."""

        async def apply() -> None:
            self.policy_version, self.in_transfer = version, False
            for server in self.servers:
                if server.index in refused:
                    # what carries this version's label was verified: a supervisor may have restored it meanwhile
                    self.retire(server, refused[server.index], "probe")
                elif server.comeback != "restart":
                    self.admit(server)

        self.run(apply())

    def withdraw(self, reason: str) -> None:
        """Takes every server out of service until ``serve``; calls under way are interrupted and over on return."""

        async def apply() -> None:
            self.in_transfer = True
            for server in self.servers:
                if server.in_service:
                    self.retire(server, reason, "transfer", level=logging.DEBUG)
            if self.interrupt is not None:
                await self.interrupt()

        self.run(apply())

    def renew(self, index: int) -> None:
        """Notes that a server runs in a new process, which may be given weights."""
        self.servers[index].comeback = "probe"

    def may_transfer(self, index: int) -> bool:
        """Returns whether weights may be transferred to a server: not to one that has to be restarted first."""
        return self.servers[index].comeback != "restart"

    @property
    def num_servers(self) -> int:
        return len(self.servers)

    def in_service(self) -> list[int]:
        """Returns the indices of the servers in service."""
        return [server.index for server in self.servers if server.in_service]

    def describe(self) -> str:
        """Returns one line that says of every server where it stands."""
        return "; ".join(
            f"server {server.index} ({server.url}) " + ("in service" if server.in_service else f"out: {server.reason}")
            for server in self.servers
        )

    def close(self) -> None:
        """Ends all calls and the loop; calling it twice is harmless."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._shutdown(), self._loop).result(_CLOSE_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CLOSE_TIMEOUT_S)
        self._loop.close()

    # -- on the loop ------------------------------------------------------------------------------------------------

    async def call(
        self, index: int, path: str, body: Mapping[str, Any] | None = None, *, timeout_s: float
    ) -> Reply:
        """Returns the reply of one HTTP call; raises aiohttp.ClientError, TimeoutError or OSError."""
        session = self._open_session()
        limits = aiohttp.ClientTimeout(total=timeout_s, sock_connect=self.options.connect_timeout_s)
        method = "GET" if body is None else "POST"
        url = self.servers[index].url + path
        async with session.request(method, url, json=body, timeout=limits, allow_redirects=False) as response:
            return Reply(response.status, await response.read())

    async def acquire(self, avoid: frozenset[int], *, timeout_s: float) -> Server | None:
        """Returns the least busy server with a free place, now counted as taken; None if none is in service.

        Servers of ``avoid`` are taken only when no other is in service. Waits up to ``timeout_s`` for one to come into
        service, and as long as needed for a free place or for the end of a transfer.
        """
        deadline = self._loop.time() + timeout_s
        while True:
            alive = [server for server in self.servers if server.in_service]
            preferred = [server for server in alive if server.index not in avoid] or alive
            free = [server for server in preferred if server.in_flight < self.options.max_concurrency]
            if free:
                server = min(free, key=lambda item: item.in_flight)
                server.in_flight += 1
                return server
            waits = bool(alive) or self.in_transfer
            if waits:
                deadline = self._loop.time() + timeout_s
            elif self._loop.time() >= deadline:
                return None
            # a plain future and no lock: all of this runs on one thread, and asyncio's Condition can lose a wake-up
            # when a waiter is cancelled (Python 3.11)
            await asyncio.wait({self._changed}, timeout=None if waits else deadline - self._loop.time())

    def release(self, server: Server) -> None:
        """Gives a place back."""
        server.in_flight -= 1
        self._wake()

    def admit(self, server: Server) -> None:
        """Puts a server into service."""
        if not server.in_service:
            _LOG.debug("server %d (%s) is in service", server.index, server.url)
        server.in_service, server.reason, server.num_failures = True, "", 0
        server.comeback = "probe"
        self._wake()

    def retire(self, server: Server, reason: str, comeback: Comeback, *, level: int = logging.WARNING) -> None:
        """Takes a server out of service, logged at ``level``; running calls to it end by themselves."""
        if server.in_service:
            _LOG.log(level, "server %d (%s) is out of service: %s", server.index, server.url, reason)
        server.in_service, server.reason, server.num_failures = False, reason, 0
        if server.comeback != "restart":
            server.comeback = comeback
        self._wake()

    def start_background(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        """Runs a coroutine that nobody waits for, except ``settle``."""
        task = self._loop.create_task(coroutine)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def settle(self) -> None:
        """Returns when no background coroutine is left."""
        while self._background:
            await asyncio.wait(set(self._background))

    def _wake(self) -> None:
        """Has everyone who waits for a place look again."""
        changed, self._changed = self._changed, self._loop.create_future()
        changed.set_result(None)

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            headers = {"Authorization": f"Bearer {self.options.api_key}"} if self.options.api_key else {}
            # trust_env stays off: a proxy of the environment has no business between trainer and server
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S), headers=headers
            )
        return self._session

    async def _shutdown(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()} - self._background
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self.settle()  # what was cancelled is being aborted on the servers
        if self._session is not None:
            await self._session.close()


def describe(error: BaseException) -> str:
    """Returns what happened to a connection, in words."""
    text = str(error) or type(error).__name__
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"connection refused or impossible ({text})"
    if isinstance(error, aiohttp.ClientPayloadError):
        return f"the body was cut off ({text})"
    return f"the connection broke ({text})"

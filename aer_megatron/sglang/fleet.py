"""The servers that a rank talks to: which are in service, how busy they are, and the HTTP calls to them.

One event loop in a thread of its own serves all requests of this process over reused connections; the public methods
are synchronous. ``serve`` puts servers into service with a policy version that was verified on them; a server that
fails is retired with a reason, and with what may bring it back:
    probe     it answers and still carries the verified version (it was unreachable, or a supervisor restored it)
    transfer  the next weight transfer to it is verified (it hung, or failed again and again)
    restart   it runs in a new process (it answered garbage)
With a router in front, a place at a server is still what a request waits for, and the router is given the servers in
service as its workers before the request goes to it.

This file does NOT know what the calls mean, and starts no processes.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import logging
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import aiohttp

from aer_megatron.sglang.addresses import check_resolves, server_url
from aer_megatron.sglang.replies import FinalAnswers, Reply, describe, read_body
from aer_megatron.sglang.router import ANSWERED_BY, RouterWorkers

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")
_KEEPALIVE_S = 4.0  # below uvicorn's 5 s: the client closes an idle connection before the server does
_CLOSE_TIMEOUT_S = 10.0
_CONTROL_BYTES = 1 << 24  # of the answer to a control call: checksums of thousands of parameters take a few MB
_FOLLOW_S = 0.1  # between two looks at a router that has not taken its workers yet

Comeback = Literal["probe", "transfer", "restart"]


@dataclass(slots=True)
class Server:
    """What this rank knows of one server, or of the router, which has no index."""

    index: int
    url: str
    in_service: bool = False
    reason: str = "no weights were transferred yet"  # why it is not in service
    comeback: Comeback = "transfer"
    in_flight: int = 0
    num_failures: int = 0  # in a row

    @property
    def name(self) -> str:
        """The server in messages."""
        return f"server {self.index} ({self.url})" if self.index >= 0 else f"router ({self.url})"


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
        ValueError: no url, one that is no address of a server or comes twice, or a host that does not exist.
    """

    def __init__(self, urls: Sequence[str], options: FleetOptions) -> None:
        if not urls:
            raise ValueError("sglang.urls is empty; name a server, or launch some with sglang.num_servers")
        self.servers = [Server(index, server_url("sglang.urls", url)) for index, url in enumerate(urls)]
        if len({server.url for server in self.servers}) < len(urls):
            raise ValueError(f"sglang.urls={list(urls)} names a server twice; leave one of them out")
        for server in self.servers:
            check_resolves("sglang.urls", server.url)
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
        self.router: Server | None = None
        self._workers: RouterWorkers | None = None
        self._following = asyncio.Lock()

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
        server = self.servers[index]
        limit = self.options.control_timeout_s if timeout_s is None else timeout_s
        try:
            return self.run(self.call(server, path, body, timeout_s=limit))
        except (aiohttp.ClientError, OSError) as error:
            cause = f"no reply within {limit:g} s" if isinstance(error, TimeoutError) else describe(error)
            raise RuntimeError(f"{server.name}: {path} failed: {cause}") from None

    def route_through(self, url: str) -> None:
        """Has generation requests go through the router at ``url``, whose workers are the servers in service.

        Raises:
            ValueError: ``url`` is no address, or its host does not exist.
            RuntimeError: no router answers there, or it has other workers than the servers of this fleet.
        """
        router = Server(-1, server_url("sglang.router_url", url), in_service=True, reason="", comeback="probe")
        check_resolves("sglang.router_url", router.url)

        async def send(method: str, path: str, body: Mapping[str, Any] | None) -> Reply:
            return await self.call(router, path, body, timeout_s=self.options.control_timeout_s, method=method)

        workers = RouterWorkers(router.url, [server.url for server in self.servers], self.options.api_key, send)
        try:
            self.run(workers.check())
        except (aiohttp.ClientError, OSError) as error:
            raise RuntimeError(
                f"sglang.router_url={url!r} does not answer: {describe(error)}; start the router first, or leave "
                "sglang.router_url empty to send requests to the servers directly"
            ) from None
        self.router, self._workers = router, workers

    def leave_router(self) -> None:
        """Takes the servers out of the router, which outlives them; harmless where it is gone, too."""
        if self._workers is None:
            return
        try:
            self.run(self._workers.leave())
        except (aiohttp.ClientError, OSError, RuntimeError) as error:
            _LOG.warning("the run's servers stay in the router: %s", error)

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

    def distrust(self, index: int) -> None:
        """Notes that a server, out of service, has to be restarted before it is given weights."""
        self.servers[index].comeback = "restart"

    def renew(self, index: int) -> None:
        """Notes that a server may be given weights: it runs in a new process, or another rank sees to that."""
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
            f"{server.name} " + ("in service" if server.in_service else f"out: {server.reason}")
            for server in [*([self.router] if self.router else []), *self.servers]
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
        self,
        server: Server,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        timeout_s: float,
        method: str | None = None,
        max_bytes: int = _CONTROL_BYTES,
    ) -> Reply:
        """Returns the reply of one HTTP call: POST with a JSON body, GET without one, unless ``method`` is given.

        Redirects are not followed: the API key goes to no other host.

        Raises aiohttp.ClientError, TimeoutError or OSError; replies.UnreadableReply for more than ``max_bytes``.
        """
        session = self._open_session()
        limits = aiohttp.ClientTimeout(total=timeout_s, sock_connect=self.options.connect_timeout_s)
        verb = method or ("GET" if body is None else "POST")
        url = server.url + path
        async with session.request(verb, url, json=body, timeout=limits, allow_redirects=False) as response:
            raw = await read_body(response, max_bytes)
            return Reply(response.status, raw, response.headers.get(ANSWERED_BY))

    async def acquire(self, avoid: frozenset[int], *, timeout_s: float) -> Server | None:
        """Returns the least busy server with a free place, now counted as taken; None if none is in service.

        Servers of ``avoid`` are taken only when no other is in service. Waits up to ``timeout_s`` for one to come into
        service, and as long as needed for a free place or for the end of a transfer. Behind a router, those in service
        are the router's workers on return.

        Raises:
            RuntimeError: the router does not take its workers within ``timeout_s``, or has others.
        """
        deadline = self._loop.time() + timeout_s
        behind_since: float | None = None  # when the router was first seen with other workers
        while True:
            alive = [server for server in self.servers if server.in_service]
            if self.router is not None and self._workers is not None:
                alive = alive if self.router.in_service else []
                wanted = frozenset(server.url for server in alive)
                if alive and self._workers.held != wanted:
                    behind_since = behind_since or self._loop.time()
                    await self._follow(self.router, self._workers, wanted, behind_since + timeout_s)
                    continue
                behind_since = None
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

    async def _follow(self, router: Server, workers: RouterWorkers, wanted: frozenset[str], deadline: float) -> None:
        """Takes one step towards a router that has the servers ``wanted``."""
        async with self._following:
            if workers.held == wanted:
                return
            try:
                missing = await workers.follow(wanted)
            except (aiohttp.ClientError, OSError) as error:
                self.retire(router, describe(error), "probe")
                return
            if missing and self._loop.time() >= deadline:
                raise RuntimeError(
                    f"{router.name} did not take its workers within sglang.recovery_timeout_s: {missing}"
                )
            if missing:
                await asyncio.sleep(_FOLLOW_S)

    def suspects(self, answered_by: str | None) -> list[Server]:
        """Returns the servers that an answer of the router may have come from; has the router looked at again."""
        if self._workers is not None:
            self._workers.forget()
        named = [server for server in self.servers if server.url == answered_by]
        return named or [server for server in self.servers if server.in_service]

    def release(self, server: Server) -> None:
        """Gives a place back."""
        server.in_flight -= 1
        self._wake()

    def admit(self, server: Server) -> None:
        """Puts a server into service."""
        if not server.in_service:
            _LOG.debug("%s is in service", server.name)
        server.in_service, server.reason, server.num_failures = True, "", 0
        server.comeback = "probe"
        self._wake()

    def retire(self, server: Server, reason: str, comeback: Comeback, *, level: int = logging.WARNING) -> None:
        """Takes a server out of service, logged at ``level``; running calls to it end by themselves."""
        if server.in_service:
            _LOG.log(level, "%s is out of service: %s", server.name, reason)
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
            headers = {"Accept-Encoding": "identity"}  # a compressed body has no bound
            if self.options.api_key:
                headers["Authorization"] = f"Bearer {self.options.api_key}"
            # trust_env stays off: a proxy of the environment has no business between trainer and server
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S)
            connector._factory = functools.partial(FinalAnswers, loop=self._loop)  # type: ignore[assignment]
            self._session = aiohttp.ClientSession(
                connector=connector,
                headers=headers,
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
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

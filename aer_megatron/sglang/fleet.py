"""The servers that a rank talks to: which are in service, and how busy they are.

``serve`` puts servers into service with a policy version that was verified on them; a server that fails is retired
with a reason, and with what may bring it back (``server_state.py``). With a router in front, a slot at a server is
still what a request waits for, and the router is given the servers in service as its workers before the request goes
to it.

This file does NOT know what the calls mean, and starts no processes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Self

import aiohttp

from aer_megatron.sglang.addresses import check_resolves, server_url
from aer_megatron.sglang.calls import Calls
from aer_megatron.sglang.http_loop import ClientOptions, HttpLoop
from aer_megatron.sglang.replies import Reply, describe
from aer_megatron.sglang.router import Router
from aer_megatron.sglang.server_state import Comeback, Server

_LOG = logging.getLogger(__name__)
_FOLLOW_S = 0.1  # between two looks at a router that has not taken its workers yet


class ServerFleet:
    """The record of who is in service; ``http`` makes the calls, ``calls`` are those of /generate under way.

    Args:
        urls: base addresses, ``http://host:port``.
        options: limits.

    Raises:
        ValueError: no url, one that is no address of a server or comes twice, or a host that does not exist.
    """

    def __init__(self, urls: Sequence[str], options: ClientOptions) -> None:
        if not urls:
            raise ValueError("sglang.urls is empty; name a server, or launch some with sglang.num_servers")
        self.servers = [Server(index, server_url("sglang.urls", url)) for index, url in enumerate(urls)]
        if len({server.url for server in self.servers}) < len(urls):
            raise ValueError(f"sglang.urls={list(urls)} names a server twice; leave one of them out")
        for server in self.servers:
            check_resolves("sglang.urls", server.url)
        self.policy_version = -1
        self.in_transfer = False
        self.http = HttpLoop(options)
        self.calls = Calls(self.http, self.servers)
        self.router: Router | None = None
        self._changed: asyncio.Future[None] = self.http.loop.create_future()
        self._following = asyncio.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.http.close()

    # -- for other threads ------------------------------------------------------------------------------------------

    def control(
        self, index: int, path: str, body: Mapping[str, Any] | None = None, *, timeout_s: float | None = None
    ) -> Reply:
        """Returns the reply of a control call: POST with a JSON body, GET without one.

        Raises:
            RuntimeError: no whole reply came, naming server, path and cause.
        """
        server = self.servers[index]
        limit = self.http.options.control_timeout_s if timeout_s is None else timeout_s
        try:
            return self.http.run(self.http.call(server.url + path, body, timeout_s=limit))
        except (aiohttp.ClientError, OSError) as error:
            cause = f"no reply within {limit:g} s" if isinstance(error, TimeoutError) else describe(error)
            raise RuntimeError(f"{server.name}: {path} failed: {cause}") from None

    def route_through(self, url: str) -> None:
        """Has generation requests go through the router at ``url``, whose workers are the servers in service.

        Raises:
            ValueError: ``url`` is no address, or its host does not exist.
            RuntimeError: no router answers there, or it has other workers than the servers of this fleet.
        """
        router = Router(url, [server.url for server in self.servers], self.http)
        try:
            self.http.run(router.listed())
        except (aiohttp.ClientError, OSError) as error:
            raise RuntimeError(
                f"sglang.router_url={url!r} does not answer: {describe(error)}; start the router first, or leave "
                "sglang.router_url empty to send requests to the servers directly"
            ) from None
        self.router = router

    def leave_router(self) -> None:
        """Takes the servers out of the router, which outlives them; harmless where it is gone, too."""
        if self.router is None:
            return
        try:
            self.http.run(self.router.leave())
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

        self.http.run(apply())

    def withdraw(self, reason: str) -> None:
        """Takes every server out of service until ``serve``; interrupts the calls under way and waits for their end."""

        async def apply() -> None:
            self.in_transfer = True
            for server in self.servers:
                if server.in_service:
                    self.retire(server, reason, "transfer", level=logging.DEBUG)
            await self.calls.interrupt()

        self.http.run(apply())

    def require_restart(self, index: int) -> None:
        """Notes that a server, out of service, has to be restarted before it is given weights."""
        self.servers[index].comeback = "restart"

    def allow_transfer(self, index: int) -> None:
        """Notes that a server may be given weights: it runs in a new process, or another rank sees to that."""
        self.servers[index].comeback = "probe"

    def may_transfer(self, index: int) -> bool:
        """Returns whether weights may be transferred to a server: not to one that has to be restarted first."""
        return self.servers[index].comeback != "restart"

    def in_service(self) -> list[int]:
        """Returns the indices of the servers in service."""
        return [server.index for server in self.servers if server.in_service]

    def describe(self) -> str:
        """Returns one line that says of every server, and of the router, where it stands."""
        return "; ".join(
            f"{server.name} " + ("in service" if server.in_service else f"out: {server.reason}")
            for server in [*([self.router] if self.router else []), *self.servers]
        )

    # -- on the loop ------------------------------------------------------------------------------------------------

    async def acquire(self, avoid: frozenset[int], *, timeout_s: float) -> Server | None:
        """Returns the least busy server with a free slot, now counted as taken; None if none is in service.

        Servers of ``avoid`` are taken only when no other is in service. Waits up to ``timeout_s`` for one to come into
        service, and as long as needed for a free slot or for the end of a transfer. Behind a router, those in service
        are the router's workers on return.

        Raises:
            RuntimeError: the router does not take its workers within ``timeout_s``, or has others.
        """
        now = self.http.loop.time
        deadline = now() + timeout_s
        behind_since: float | None = None  # when the router was first seen with other workers
        while True:
            alive = [server for server in self.servers if server.in_service]
            # a router first gets the servers in service as its workers; then everything is looked at again
            if self.router is not None:
                alive = alive if self.router.in_service else []
                wanted = frozenset(server.url for server in alive)
                if alive and self.router.held != wanted:
                    behind_since = behind_since or now()
                    await self._follow(self.router, wanted, behind_since + timeout_s)
                    continue
                behind_since = None
            # take a slot, rather at a server that did not fail this request yet
            preferred = [server for server in alive if server.index not in avoid] or alive
            free = [server for server in preferred if server.in_flight < self.http.options.max_concurrency]
            if free:
                server = min(free, key=lambda item: item.in_flight)
                server.in_flight += 1
                return server
            # wait for a change: without limit for a slot or the end of a transfer, else until the deadline
            waits = bool(alive) or self.in_transfer
            if waits:
                deadline = now() + timeout_s
            elif now() >= deadline:
                return None
            # a plain future and no lock: all of this runs on one thread, and asyncio's Condition can lose a wake-up
            # when a waiter is cancelled (Python 3.11)
            await asyncio.wait({self._changed}, timeout=None if waits else deadline - now())

    async def _follow(self, router: Router, wanted: frozenset[str], deadline: float) -> None:
        """Takes one step towards a router that has the servers ``wanted``."""
        async with self._following:
            if router.held == wanted:
                return
            try:
                missing = await router.follow(wanted)
            except (aiohttp.ClientError, OSError) as error:
                self.retire(router, describe(error), "probe")
                return
            if missing and self.http.loop.time() >= deadline:
                raise RuntimeError(
                    f"{router.name} did not take its workers within sglang.recovery_timeout_s: {missing}"
                )
            if missing:
                await asyncio.sleep(_FOLLOW_S)

    def suspects(self, answered_by: str | None) -> list[Server]:
        """Returns the servers that an answer of the router may have come from."""
        named = [server for server in self.servers if server.url == answered_by]
        return named or [server for server in self.servers if server.in_service]

    def release(self, server: Server) -> None:
        """Gives a slot back."""
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

    def _wake(self) -> None:
        """Has everyone who waits in ``acquire`` look again."""
        changed, self._changed = self._changed, self.http.loop.create_future()
        changed.set_result(None)

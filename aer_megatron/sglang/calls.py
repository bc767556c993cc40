"""The /generate calls of this process that are under way: each has a name, by which it can be aborted on its server."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from aer_megatron.sglang.http_loop import HttpLoop
from aer_megatron.sglang.replies import Reply, is_ours
from aer_megatron.sglang.router import Router
from aer_megatron.sglang.server_state import Server

_MAX_ABORTS = 256  # under way at a time: behind a router each goes to every server
_ABORT_TIMEOUT_S = 2.0  # an abort is a courtesy to the server: nobody waits longer for it
_ABORT_AGAIN_S = 0.2  # an abort that overtook its request is not heard of again


class CallFailed(Exception):
    """A call that gave no completion and may be repeated; ``answered_by``: the server that a router names."""

    def __init__(self, reason: str, answered_by: str | None = None) -> None:
        super().__init__(reason)
        self.answered_by = answered_by


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """How long and how often a request is tried; the values live in the configuration's [sglang] section."""

    request_timeout_s: float  # one /generate call
    max_attempts: int  # of one request, over all servers
    max_failures: int  # of a server in a row
    recovery_timeout_s: float  # how long a request waits for a server when none is in service
    probe_interval_s: float  # how often servers out of service are asked whether they are back


@dataclass(slots=True)
class Call:
    """One call, to a server or to the router."""

    server: Server
    rid: str
    deadline: asyncio.Timeout
    interrupted: bool = False


class Calls:
    """The calls under way over ``http``; ``servers`` are all that a router may have given one to."""

    def __init__(self, http: HttpLoop, servers: Sequence[Server]) -> None:
        self._http = http
        self._servers = servers
        self._prefix = f"aer-{uuid.uuid4().hex[:8]}"
        self._numbers = itertools.count()
        self._under_way: dict[str, Call] = {}
        self._idle = asyncio.Event()
        self._aborting = asyncio.Semaphore(_MAX_ABORTS)

    def new(self, server: Server, timeout_s: float) -> Call:
        """Returns a call to ``server`` that ``generate`` has still to make."""
        # SGLang aborts every request whose name begins with the given one: the dot keeps -1 from ending -12
        rid = f"{self._prefix}-{next(self._numbers)}."
        return Call(server, rid, asyncio.timeout(timeout_s))

    async def generate(self, call: Call, body: Mapping[str, Any], *, timeout_s: float, max_bytes: int) -> Reply:
        """Returns the reply of a call; one that ends without a whole reply is aborted on its server.

        Raises aiohttp.ClientError, TimeoutError or OSError; replies.UnreadableReply for more than ``max_bytes``.
        """
        self._under_way[call.rid] = call
        self._idle.clear()
        url = call.server.url + "/generate"
        try:
            async with call.deadline:
                return await self._http.call(url, body, timeout_s=timeout_s, max_bytes=max_bytes)
        except (asyncio.CancelledError, aiohttp.ClientError, OSError) as error:
            if not isinstance(error, aiohttp.ClientConnectorError) and not is_ours(error):  # it has reached the server
                self.abort(call)
            raise
        finally:
            del self._under_way[call.rid]
            if not self._under_way:
                self._idle.set()

    def abort(self, call: Call) -> None:
        """Has the server end a call that nobody waits for any more; does not wait for it."""
        self._http.start_background(self._send_abort(call))

    async def interrupt(self) -> None:
        """Ends all calls: aborted, those that do not answer to it within the control timeout are given up.

        Nothing may begin meanwhile.
        """
        limit = self._http.loop.time() + self._http.options.control_timeout_s
        for call in self._under_way.values():
            call.interrupted = True
            if not call.deadline.expired():
                call.deadline.reschedule(limit)
        while self._under_way:
            await asyncio.gather(*map(self._send_abort, list(self._under_way.values())))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), _ABORT_AGAIN_S)

    async def _send_abort(self, call: Call) -> None:
        """Aborts a call; one to the router at every server, because it may be any of them that has it."""

        async def abort(server: Server) -> None:
            # an error: the server is gone, and the request with it
            async with self._aborting:
                with contextlib.suppress(aiohttp.ClientError, OSError):
                    await self._http.call(server.url + "/abort_request", {"rid": call.rid}, timeout_s=_ABORT_TIMEOUT_S)

        await asyncio.gather(*map(abort, self._servers if isinstance(call.server, Router) else [call.server]))

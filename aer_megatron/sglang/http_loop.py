"""HTTP calls to servers: one event loop in a thread of its own serves all requests of this process.

Connections are used again. ``run`` and ``close`` are for other threads, the rest runs on the loop.

This file does NOT know what the calls mean.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import threading
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import aiohttp

from aer_megatron.sglang.replies import FinalAnswers, Reply, read_body

ANSWERED_BY = "x-smg-routed-worker-id"  # header of smg's answers: the address of the server; sglang-router has none
_T = TypeVar("_T")
_KEEPALIVE_S = 4.0  # below uvicorn's 5 s: the client closes an idle connection before the server does
_CLOSE_TIMEOUT_S = 10.0
_CONTROL_BYTES = 1 << 24  # of the answer to a control call: checksums of thousands of parameters take a few MB
_CLOSED = "the connection to the rollout servers is closed"


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """Limits of the calls; the values live in the configuration's [sglang] section."""

    max_concurrency: int  # /generate calls per server and rank
    connect_timeout_s: float
    control_timeout_s: float
    api_key: str | None = field(repr=False)


class HttpLoop:
    """An event loop with an HTTP client; ``close`` ends both."""

    def __init__(self, options: ClientOptions) -> None:
        self.options = options
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="sglang-http", daemon=True)
        self._thread.start()
        self._session: aiohttp.ClientSession | None = None
        self._background: set[asyncio.Task[Any]] = set()

    def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Returns what ``coroutine`` returns on the loop; an interrupt cancels it and waits for its end."""
        if self.loop.is_closed():
            coroutine.close()
            raise RuntimeError(_CLOSED)
        ended = threading.Event()

        async def watched() -> _T:
            try:
                return await coroutine
            finally:
                ended.set()

        future = asyncio.run_coroutine_threadsafe(watched(), self.loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise RuntimeError(_CLOSED) from None
        except BaseException:
            future.cancel()
            ended.wait(_CLOSE_TIMEOUT_S)
            raise

    def close(self) -> None:
        """Ends all calls and the loop; calling it twice is harmless."""
        if self.loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._shutdown(), self.loop).result(_CLOSE_TIMEOUT_S)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(_CLOSE_TIMEOUT_S)
        self.loop.close()

    async def call(
        self,
        url: str,
        body: Mapping[str, Any] | None = None,
        *,
        timeout_s: float | None = None,
        method: str | None = None,
        max_bytes: int = _CONTROL_BYTES,
    ) -> Reply:
        """Returns the reply of one HTTP call: POST with a JSON body, GET without one, unless ``method`` is given.

        Redirects are not followed: the API key goes to no other host. ``timeout_s``: None = that of control calls.

        Raises aiohttp.ClientError, TimeoutError or OSError; replies.UnreadableReply for more than ``max_bytes``.
        """
        session = self._open_session()
        total = self.options.control_timeout_s if timeout_s is None else timeout_s
        limits = aiohttp.ClientTimeout(total=total, sock_connect=self.options.connect_timeout_s)
        verb = method or ("GET" if body is None else "POST")
        async with session.request(verb, url, json=body, timeout=limits, allow_redirects=False) as response:
            raw = await read_body(response, max_bytes)
            return Reply(response.status, raw, response.headers.get(ANSWERED_BY))

    def start_background(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        """Runs a coroutine that nobody waits for, except ``settle``."""
        task = self.loop.create_task(coroutine)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def settle(self) -> None:
        """Waits until no background coroutine is left."""
        while self._background:
            await asyncio.wait(set(self._background))

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            headers = {"Accept-Encoding": "identity"}  # a compressed body has no bound
            if self.options.api_key:
                headers["Authorization"] = f"Bearer {self.options.api_key}"
            # trust_env stays off: a proxy of the environment has no business between trainer and server
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S)
            connector._factory = functools.partial(FinalAnswers, loop=self.loop)  # type: ignore[assignment]
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

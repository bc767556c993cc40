"""An HTTP server of the tests on a thread of its own: what the doubles of a server and of a router live on."""

from __future__ import annotations

import asyncio
import threading
from typing import Self

from aiohttp import web


class HttpDouble:
    """Runs from entering to leaving; subclasses give ``_start`` and ``_stop``, which run on its event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._runner: web.AppRunner | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def start(self) -> None:
        """The port answers, as a new process would."""
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)

    def stop(self) -> None:
        """The port refuses connections from now on; running requests break."""
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)

    async def _start(self) -> None:
        raise NotImplementedError

    async def _stop(self) -> None:
        raise NotImplementedError

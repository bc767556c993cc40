"""A router in front of the servers: which of them it may send requests to.

The worker API is that of smg (Shepherd Model Gateway) and of its predecessor sglang-router 0.3: GET /workers,
POST /workers {"url"}, DELETE /workers/{id}, both answered at once and carried out later. A worker that is removed first
drains for some seconds: it is listed, gets no new request and cannot be added again until it has gone.

This file does NOT send generation requests and does not know which servers are fit for them.
"""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple

from aer_megatron.sglang.replies import Reply, printable, shown

ANSWERED_BY = "x-smg-routed-worker-id"  # header of smg's answers: the address of the server; sglang-router has none
_ACCEPTED = (200, 201, 202)
_LISTED_WITHIN_S = 5.0
_MAX_ID = 200
_MAX_NAMED = 20  # workers in a message
_WORKER_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]*", re.ASCII)  # one segment of a path, and no other path


class _Worker(NamedTuple):
    id: str
    is_ready: bool
    is_leaving: bool


class RouterWorkers:
    """The workers of a router, which belongs to this run: a server that is not the run's is an error.

    Args:
        url: of the router, for messages.
        servers: addresses of the run's servers, as the router is to know them.
        api_key: of the servers; the router gets it with each of them.
        send: (method, path, JSON body) -> the router's reply.
    """

    def __init__(
        self,
        url: str,
        servers: Sequence[str],
        api_key: str | None,
        send: Callable[[str, str, Mapping[str, Any] | None], Awaitable[Reply]],
    ) -> None:
        self._url = url
        self._servers = servers
        self._api_key = api_key
        self._send = send
        self._added: dict[str, float] = {}  # accepted at a time, and not listed yet
        self.held: frozenset[str] | None = None  # the servers that were found to be the router's; None: look

    def forget(self) -> None:
        """Has the next ``follow`` look at the router again: it may have been restarted, or have lost a worker."""
        self._added.clear()
        self.held = None

    async def check(self) -> None:
        """Raises RuntimeError where the router refuses to list its workers or has other ones than the run's servers."""
        await self._listed()

    async def follow(self, wanted: frozenset[str]) -> str:
        """Returns "" when the router has the servers ``wanted`` and no other; else what is still to be done.

        One round: it asks, adds and removes, and does not wait. One ready server is enough, others that are listed get
        ready by themselves. A server that was accepted may yet be dropped, by a removal that was still under way: it is
        added again.
        """
        listed = await self._listed()
        now = time.monotonic()
        self._added = {u: at for u, at in self._added.items() if u not in listed and now - at < _LISTED_WITHIN_S}
        surplus = [url for url, worker in listed.items() if url not in wanted and not worker.is_leaving]
        for url in surplus:
            await self._send("DELETE", f"/workers/{listed[url].id}", None)
        for url in wanted - listed.keys() - self._added.keys():
            key = {"api_key": self._api_key} if self._api_key else {}
            reply = await self._send("POST", "/workers", {"url": url, "worker_type": "regular"} | key)
            if reply.status in _ACCEPTED:
                self._added[url] = now
            elif reply.status != 409:  # another rank was faster
                raise RuntimeError(f"the router ({self._url}) does not add {url}: {reply.status} {reply.text}")
        is_here = any(url in wanted and worker.is_ready for url, worker in listed.items())
        all_listed = all(url in listed and not listed[url].is_leaving for url in wanted)
        if is_here and all_listed and not surplus:
            self.held = wanted
            return ""
        return f"it lists {_describe(listed) or 'no worker'}, and should have {', '.join(sorted(wanted))}"

    async def leave(self) -> None:
        """Takes the run's servers out of the router."""
        for worker in (await self._listed()).values():
            if not worker.is_leaving:
                await self._send("DELETE", f"/workers/{worker.id}", None)

    async def _listed(self) -> dict[str, _Worker]:
        reply = await self._send("GET", "/workers", None)
        if reply.status in (401, 403):
            raise RuntimeError(
                f"the router ({self._url}) answers {reply.status} to /workers: set sglang.api_key_env to the name of "
                "the environment variable that holds its API key, which is the servers' too"
            )
        if reply.status >= 500:  # it is being restarted, or something in front of it has lost it
            raise OSError(f"/workers answers {reply.status}: {reply.text}")
        table = reply.json()
        if reply.status != 200 or not isinstance(table, Mapping) or not isinstance(table.get("workers"), list):
            raise RuntimeError(
                f"sglang.router_url={self._url!r} answers {reply.status} to GET /workers: {reply.text[:200]!r}; "
                "it must be the address of smg or of sglang-router >= 0.3"
            )
        for row in table["workers"]:
            if not _is_worker(row):
                raise RuntimeError(f"the router ({self._url}) lists a worker without an address or an id: {shown(row)}")
        listed = {row["url"].rstrip("/"): _worker(row) for row in table["workers"]}
        others = {url: worker for url, worker in listed.items() if url not in self._servers}
        if others:
            names = [f"{printable(url)} (DELETE {self._url}/workers/{worker.id})" for url, worker in others.items()]
            ids = ", ".join(names[:_MAX_NAMED])
            raise RuntimeError(
                f"the router ({self._url}) has workers that are not this run's servers: {ids}; this run's are "
                f"{', '.join(self._servers)}. Remove them, or give sglang.urls and the router the same addresses"
            )
        return listed


def _is_worker(row: Any) -> bool:
    """Returns whether a row names an address and an id that is one segment of a path."""
    if not isinstance(row, Mapping) or not isinstance(row.get("url"), str):
        return False
    name = row.get("id")
    return isinstance(name, str) and len(name) <= _MAX_ID and _WORKER_ID.fullmatch(name) is not None


def _worker(row: Mapping[str, Any]) -> _Worker:
    return _Worker(str(row["id"]), bool(row.get("is_healthy")), row.get("status") == "draining")


def _describe(listed: Mapping[str, _Worker]) -> str:
    def state(worker: _Worker) -> str:
        return "leaving" if worker.is_leaving else "ready" if worker.is_ready else "not ready"

    return ", ".join(f"{url} ({state(worker)})" for url, worker in listed.items())

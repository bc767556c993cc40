"""A router in front of the servers: which of them it may send requests to.

The worker API is that of smg (Shepherd Model Gateway) and of its predecessor sglang-router 0.3: GET /workers,
POST /workers {"url"}, DELETE /workers/{id}, both answered at once and carried out later. A worker that is removed first
drains for some seconds: it is listed, gets no new request and cannot be added again until it has gone.

This file does NOT send generation requests and does not know which servers are fit for them.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from aer_megatron.sglang.addresses import check_resolves, server_url
from aer_megatron.sglang.http_loop import HttpLoop
from aer_megatron.sglang.replies import Reply, printable, shown
from aer_megatron.sglang.server_state import Server

_ACCEPTED = (200, 201, 202)
_LISTED_WITHIN_S = 5.0
_MAX_ID = 200
_MAX_NAMED = 20  # workers in a message
_WORKER_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]*", re.ASCII)  # one segment of a path, and no other path


class _Worker(NamedTuple):
    id: str
    is_ready: bool
    is_leaving: bool


class Router(Server):
    """A router that belongs to this run: a worker of it that is not one of the run's servers is an error.

    Args:
        url: of the router.
        servers: addresses of the run's servers, as the router is to know them.
        http: makes the calls; its API key is the servers', and the router gets it with each of them.

    Raises:
        ValueError: ``url`` is no address, or its host does not exist.
    """

    def __init__(self, url: str, servers: Sequence[str], http: HttpLoop) -> None:
        super().__init__(-1, server_url("sglang.router_url", url), in_service=True, reason="", comeback="probe")
        check_resolves("sglang.router_url", self.url)
        self._servers = servers
        self._http = http
        self._added: dict[str, float] = {}  # accepted at a time, and not listed yet
        self.held: frozenset[str] | None = None  # the servers that were found to be its workers; None: look

    @property
    def name(self) -> str:
        """The router in messages."""
        return f"router ({self.url})"

    def forget(self) -> None:
        """Has the next ``follow`` look at the router again: it may have been restarted, or have lost a worker."""
        self._added.clear()
        self.held = None

    async def follow(self, wanted: frozenset[str]) -> str:
        """Takes one step towards the workers ``wanted`` and no others; returns what is still to be done, or "".

        It asks, adds and removes, and does not wait. One ready server is enough: others that are listed get ready by
        themselves. Raises what ``listed`` raises, and RuntimeError where the router refuses a server.
        """
        listed = await self.listed()
        # one that was accepted may yet be dropped, by a removal that was still under way: it is added again
        now = time.monotonic()
        self._added = {u: at for u, at in self._added.items() if u not in listed and now - at < _LISTED_WITHIN_S}
        # remove what is out of service, add what is missing
        surplus = [url for url, worker in listed.items() if url not in wanted and not worker.is_leaving]
        for url in surplus:
            await self._send("DELETE", f"/workers/{listed[url].id}")
        for url in wanted - listed.keys() - self._added.keys():
            key = {"api_key": self._http.options.api_key} if self._http.options.api_key else {}
            reply = await self._send("POST", "/workers", {"url": url, "worker_type": "regular"} | key)
            if reply.status in _ACCEPTED:
                self._added[url] = now
            elif reply.status != 409:  # another rank was faster
                raise RuntimeError(f"the {self.name} does not add {url}: {reply.status} {reply.text}")
        is_here = any(url in wanted and worker.is_ready for url, worker in listed.items())
        all_listed = all(url in listed and not listed[url].is_leaving for url in wanted)
        if is_here and all_listed and not surplus:
            self.held = wanted
            return ""
        return f"it lists {_describe(listed) or 'no worker'}, and should have {', '.join(sorted(wanted))}"

    async def leave(self) -> None:
        """Takes the run's servers out of the router."""
        for worker in (await self.listed()).values():
            if not worker.is_leaving:
                await self._send("DELETE", f"/workers/{worker.id}")

    async def listed(self) -> dict[str, _Worker]:
        """Returns the workers by address.

        Raises:
            RuntimeError: the router refuses to list them, or has other ones than the run's servers.
            aiohttp.ClientError, OSError: it does not answer.
        """
        reply = await self._send("GET", "/workers")
        if reply.status in (401, 403):
            raise RuntimeError(
                f"the {self.name} answers {reply.status} to /workers: set sglang.api_key_env to the name of "
                "the environment variable that holds its API key, which is the servers' too"
            )
        if reply.status >= 500:  # it is being restarted, or something in front of it has lost it
            raise OSError(f"/workers answers {reply.status}: {reply.text}")
        table = reply.json()
        if reply.status != 200 or not isinstance(table, Mapping) or not isinstance(table.get("workers"), list):
            raise RuntimeError(
                f"sglang.router_url={self.url!r} answers {reply.status} to GET /workers: {reply.text[:200]!r}; "
                "it must be the address of smg or of sglang-router >= 0.3"
            )
        for row in table["workers"]:
            if not _is_worker(row):
                raise RuntimeError(f"the {self.name} lists a worker without an address or an id: {shown(row)}")
        listed = {row["url"].rstrip("/"): _worker(row) for row in table["workers"]}
        others = {url: worker for url, worker in listed.items() if url not in self._servers}
        if others:
            names = [f"{printable(url)} (DELETE {self.url}/workers/{worker.id})" for url, worker in others.items()]
            ids = ", ".join(names[:_MAX_NAMED])
            raise RuntimeError(
                f"the {self.name} has workers that are not this run's servers: {ids}; this run's are "
                f"{', '.join(self._servers)}. Remove them, or give sglang.urls and the router the same addresses"
            )
        return listed

    async def _send(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Reply:
        return await self._http.call(self.url + path, body, method=method)


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

"""A router in front of SGLang servers, as smg 1.13 behaves: round robin, workers by REST, control calls unknown.

``tests/contract/test_router_contract.py`` holds it to the real one.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
from aiohttp import web

from tests.support.http_double import HttpDouble
from tests.support.sglang_double import SGLangDouble


@dataclass
class Worker:
    """A server that the router knows."""

    id: str
    url: str
    api_key: str | None
    status: str = "ready"


class RouterDouble(HttpDouble):
    """Forwards /generate to its ready workers in turn; what it drops from replies and requests is up to the test."""

    def __init__(
        self,
        workers: Sequence[str] = (),
        *,
        api_key: str | None = None,
        drops: Sequence[str] = (),
        names_workers: bool = True,
        drain_s: float = 0.1,
    ) -> None:
        super().__init__()
        self.drops = drops  # fields of replies; "rid": of requests
        self.names_workers = names_workers
        self.sent: list[tuple[str, dict[str, Any]]] = []  # (worker, body) of every request
        self.refused: list[str] = []  # paths that a router does not know
        self.num_failed = 0  # requests whose worker gave no answer
        self._api_key = api_key
        self._drain_s = drain_s
        self._ids = itertools.count()
        self._turn = itertools.count()
        self._first = list(workers)
        self.workers: dict[str, Worker] = {}
        self._port = 0
        self._session: aiohttp.ClientSession | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def ready(self) -> set[str]:
        """The workers that requests may go to."""
        return {worker.url for worker in self.workers.values() if worker.status == "ready"}

    async def _start(self) -> None:
        self.workers = {}  # a new process has those of its command line
        for url in self._first:
            self._add(url, self._api_key)
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        app = web.Application(middlewares=[self._authorize])
        app.add_routes(
            [
                web.get("/workers", self._list),
                web.post("/workers", self._post),
                web.delete("/workers/{id}", self._delete),
                web.post("/generate", self._generate),
                web.route("*", "/{path:.*}", self._unknown),
            ]
        )
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True)
        await site.start()
        assert site._server is not None
        self._port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]

    async def _stop(self) -> None:
        if self._runner is not None and self._session is not None:
            await self._runner.cleanup()
            await self._session.close()
        self._runner = self._session = None

    # -- handlers -----------------------------------------------------------------------------------------------------

    @web.middleware
    async def _authorize(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if self._api_key and request.headers.get("Authorization") != f"Bearer {self._api_key}":
            return web.Response(status=401)
        response: web.StreamResponse = await handler(request)
        return response

    async def _unknown(self, request: web.Request) -> web.Response:
        self.refused.append(request.path)
        return web.Response(status=404)

    async def _list(self, request: web.Request) -> web.Response:
        rows = [
            {"id": worker.id, "url": worker.url, "status": worker.status, "is_healthy": worker.status == "ready"}
            for worker in self.workers.values()
        ]
        return web.json_response({"workers": rows, "total": len(rows)})

    async def _post(self, request: web.Request) -> web.Response:
        body = await request.json()
        if any(worker.url == body["url"] for worker in self.workers.values()):
            return web.json_response({"error": "Worker already exists", "code": "WORKER_ALREADY_EXISTS"}, status=409)
        self._loop.call_later(0.02, self._add, body["url"], body.get("api_key"))
        return web.json_response({"status": "accepted", "url": body["url"]}, status=202)

    async def _delete(self, request: web.Request) -> web.Response:
        worker = self.workers.get(request.match_info["id"])
        if worker is None:
            return web.json_response({"error": "not found", "code": "WORKER_NOT_FOUND"}, status=404)
        worker.status = "draining"
        self._loop.call_later(self._drain_s, self.workers.pop, worker.id, None)
        return web.json_response({"status": "accepted", "worker_id": worker.id}, status=202)

    async def _generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        ready = [worker for worker in self.workers.values() if worker.status == "ready"]
        if not ready:
            return web.json_response({"error": {"message": "no available workers"}}, status=503)
        worker = ready[next(self._turn) % len(ready)]
        self.sent.append((worker.url, body))
        headers = {"Authorization": f"Bearer {worker.api_key}"} if worker.api_key else {}
        forwarded = body | {"rid": f"router-{len(self.sent)}"} if "rid" in self.drops else body
        named = {"x-smg-routed-worker-id": worker.url} if self.names_workers else {}
        assert self._session is not None
        try:
            async with self._session.post(worker.url + "/generate", json=forwarded, headers=headers) as reply:
                status, raw = reply.status, await reply.read()
        except (aiohttp.ClientError, OSError) as error:  # then smg names no worker either
            self.num_failed += 1
            return web.json_response({"error": {"message": f"error sending request: {error}"}}, status=500)
        if self.drops and status == 200:
            raw = json.dumps(_without(json.loads(raw), self.drops)).encode()
        return web.Response(body=raw, status=status, content_type="application/json", headers=named)

    def _add(self, url: str, api_key: str | None) -> None:
        if all(worker.url != url for worker in self.workers.values()):  # two clients may have asked at once
            worker = Worker(f"id-{next(self._ids)}", url, api_key)
            self.workers[worker.id] = worker


def set_pace(server: SGLangDouble, token_s: float) -> None:
    """Has a server take ``token_s`` per token from now on."""
    server._args = (*server._args[:2], token_s, *server._args[3:])


def kill(server: SGLangDouble) -> None:
    """Ends a server as SIGKILL does: what is under way breaks, and nothing listens any more."""

    async def break_connections() -> None:
        assert server._runner is not None and server._runner.server is not None
        for connection in server._runner.server.connections:
            if connection.transport is not None:
                connection.transport.abort()

    asyncio.run_coroutine_threadsafe(break_connections(), server._loop).result(10)
    server.stop()


def _without(table: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    kept = {name: value for name, value in table.items() if name not in names}
    return {name: _without(value, names) if name == "meta_info" else value for name, value in kept.items()}

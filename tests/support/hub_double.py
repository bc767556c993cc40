"""A double of the Hugging Face hub for data sets: its Parquet branch, as huggingface_hub asks for it.

Served: the commit of a revision, the tree of a commit, and files. What is asked is counted.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote

import pytest
from aiohttp import web

from tests.support.http_double import HttpDouble

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubDouble(HttpDouble):
    """``sets``: data set id -> {path: content}; ``sizes`` says of a path what the tree claims instead."""

    def __init__(self, sets: Mapping[str, Mapping[str, bytes]]) -> None:
        super().__init__()
        self.sets = {name: dict(files) for name, files in sets.items()}
        self.sizes: dict[str, int] = {}
        self.status: int | None = None  # what every request is answered with, if anything; so is body
        self.body: bytes | None = None
        self.asked: Counter[str] = Counter()
        self._port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    async def _start(self) -> None:
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(application)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port)
        await site.start()
        self._port = self._runner.addresses[0][1]

    async def _stop(self) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        parts = [unquote(part) for part in request.rel_url.raw_path.strip("/").split("/")]
        self.asked[f"{request.method} {'/'.join(parts)}"] += 1
        if self.body is not None:
            return web.Response(body=self.body)
        if self.status is not None or len(parts) < 6:
            return web.Response(status=self.status or 404)
        is_api = parts[0] == "api"
        _, owner, name, kind, revision, *rest = parts[1:] if is_api else parts
        files = self.sets.get(f"{owner}/{name}")
        if files is None:
            return web.Response(status=401, headers={"X-Error-Code": "RepoNotFound"})
        if revision not in ("refs/convert/parquet", COMMIT):
            return web.Response(status=404, headers={"X-Error-Code": "RevisionNotFound"})
        if is_api and kind == "revision":
            return web.json_response({"id": f"{owner}/{name}", "sha": COMMIT, "siblings": []})
        if is_api and kind == "tree":
            return web.json_response(
                [
                    {"type": "file", "path": path, "size": self.sizes.get(path, len(content)), "oid": _etag(content)}
                    for path, content in files.items()
                ]
            )
        content = files.get("/".join(rest))
        if content is None:
            return web.Response(status=404, headers={"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": COMMIT}
        return web.Response(body=content, headers=headers)


def use_hub(monkeypatch: pytest.MonkeyPatch, url: str, cache: Path) -> None:
    """Points huggingface_hub, in this process, at ``url``; it reads the environment at its import only."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()

"""Speaks SGLang's RL protocol (0.5.23) without a model: faults on demand, sub-second, in this process or as a program.

The weights are real: it loads safetensors folders, joins them as the server does and reports SHA-256 checksums. The
tokens are not: they are drawn from a hash of the request, their log-probabilities are made up, and a request lasts
``token_s`` per token. ``tests/contract`` holds it to the real server.

    python tests/support/sglang_double.py --model-path FOLDER --host 127.0.0.1 --port PORT [--token-s S]
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import io
import logging
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from aiohttp import web
from numpy.typing import NDArray

from aer_megatron.sglang.addresses import in_url
from tests.support.http_double import HttpDouble
from tests.support.reply_faults import SpoiledReply, spoil
from tests.support.served_weights import (
    NUMPY_DTYPES,
    AllowListed,
    incomplete,
    join_group,
    join_store,
    joined,
    receive,
    reported_checksums,
    served_weights,
)

Fault = Literal["none", "slow", "500", "reset", "truncated", "hang", "redirect", "aborted", SpoiledReply]
_SLOW_S = 0.3
_LOST = "model.layers.0.self_attn.o_proj.weight"
_OUTSIDE = "update_weights_from_{} must run between begin_weight_update() and end_weight_update()"


@dataclass
class Running:
    """A request under way."""

    aborted: asyncio.Event = field(default_factory=asyncio.Event)


class SGLangDouble(HttpDouble):
    """One stand-in server; ``fault`` applies to the next ``num_faults`` /generate calls (-1 = all)."""

    def __init__(
        self,
        model_path: Path,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        token_s: float = 0.0,
        api_key: str | None = None,
        vocab_size: int = 25,
        legacy: bool = False,
        without_weights: bool = False,
    ) -> None:
        super().__init__()
        self.fault: Fault = "none"
        self.num_faults = -1
        self.update_fault: Literal["none", "500", "drops_a_tensor", "hang", "keeps_version"] = "none"
        self.group_fault: Literal["none", "refuses", "joins_and_refuses", "says_so_only"] = "none"
        self.running: dict[str, Running] = {}
        self.aborts: list[str] = []
        self.rids: list[str] = []
        self.num_completed = 0
        self.weight_version = "default"
        self.weights = {} if without_weights else served_weights(model_path)
        self.legacy = legacy
        self.in_session = False
        self.groups: dict[str, Any] = {}
        self.received: dict[str, NDArray[Any]] = {}
        self.loaded: list[tuple[str, str]] = []  # (name, dtype) of what came in buckets, in order
        self.released = False
        self.access_log: logging.Logger | None = None
        self._args = (host, port, token_s, api_key, vocab_size)

    # -- life ---------------------------------------------------------------------------------------------------------

    def start_again(self, weight_version: str) -> None:
        """The same port answers again."""
        self.weight_version = weight_version
        self.start()

    @property
    def url(self) -> str:
        return f"http://{in_url(self._args[0])}:{self._args[1]}"

    async def _start(self) -> None:
        app = web.Application(middlewares=[self._authorize], client_max_size=1 << 30)
        app.add_routes(
            [
                web.post("/generate", self._generate),
                web.post("/abort_request", self._abort),
                web.get("/ready", self._ok),
                web.get("/health", self._ok),
                web.get("/model_info", self._info),
                web.get("/server_info", self._info),
                web.post("/weights_checker", self._checksums),
                web.post("/update_weights_from_disk", self._update_from_disk),
                web.post("/update_weight_version", self._update_version),
                web.post("/init_weights_update_group", self._init_group),
                web.post("/destroy_weights_update_group", self._destroy_group),
                web.post("/update_weights_from_distributed", self._update_distributed),
                web.post("/update_weights_from_tensor", self._update_tensor),
                web.post("/flush_cache", self._flush),
                web.post("/release_memory_occupation", self._release),
                web.post("/resume_memory_occupation", self._resume),
            ]
        )
        if not self.legacy:  # up to 0.5.20 there were no sessions
            app.add_routes([web.post("/begin_weight_update", self._begin), web.post("/end_weight_update", self._end)])
        self._runner = web.AppRunner(app, access_log=self.access_log, shutdown_timeout=0.1)
        await self._runner.setup()
        host, port, *rest = self._args
        site = web.TCPSite(self._runner, host, port, reuse_address=True)
        await site.start()
        assert site._server is not None
        self._args = (host, site._server.sockets[0].getsockname()[1], *rest)  # type: ignore[attr-defined]

    async def _stop(self) -> None:
        for running in self.running.values():
            running.aborted.set()
        if self._runner is not None:
            await self._runner.cleanup()

    # -- handlers -----------------------------------------------------------------------------------------------------

    @web.middleware
    async def _authorize(self, request: web.Request, handler: Any) -> web.StreamResponse:
        key = self._args[3]
        exempt = request.path in ("/health", "/metrics")  # as on the real server
        if key and not exempt and request.headers.get("Authorization") != f"Bearer {key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        response: web.StreamResponse = await handler(request)
        return response

    async def _ok(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _info(self, request: web.Request) -> web.Response:
        return web.json_response({"weight_version": self.weight_version, "tp_size": 1, "device": "cpu"})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        rid, version = body["rid"], self.weight_version
        if rid in self.running:
            return web.json_response({"error": {"message": f"Duplicate request ID detected: {rid}"}}, status=400)
        if not body["input_ids"]:
            return web.json_response({"error": {"message": "input_ids is empty"}}, status=400)
        fault = self._take_fault()
        running = self.running[rid] = Running()
        self.rids.append(rid)
        try:
            if fault == "reset":
                assert request.transport is not None
                request.transport.abort()
            if fault == "500":
                return web.json_response({"error": {"message": "internal"}}, status=500)
            reply = await self._complete(body, running, fault)
            reply["meta_info"]["weight_version"] = version
            reply["meta_info"]["weight_versions"] = [{"version": version, "start": 0, "end": len(reply["output_ids"])}]
        finally:
            del self.running[rid]
        self.num_completed += 1
        return await self._spoiled(request, reply, fault)

    async def _complete(self, body: dict[str, Any], running: Running, fault: Fault) -> dict[str, Any]:
        params: dict[str, Any] = body["sampling_params"]
        output: list[int] = []
        reason: dict[str, Any] | None = None
        limit = params["max_new_tokens"]
        pause_s = {"slow": _SLOW_S, "hang": 3600.0}.get(fault, 0.0)
        if pause_s:
            await _until(running.aborted, pause_s)
        while reason is None:
            if running.aborted.is_set() or fault == "aborted":
                reason = {"type": "abort", "message": "Abort", "status_code": None, "err_type": None}
                break
            if self._args[2]:
                await _until(running.aborted, self._args[2])
            text = f"{body['input_ids']} {params.get('sampling_seed')} {len(output)}".encode()
            output.append(hashlib.sha256(text).digest()[0] % self._args[4])
            if output[-1] in params["stop_token_ids"]:
                reason = {"type": "stop", "matched": output[-1]}
            elif len(output) == limit:
                reason = {"type": "length", "length": limit}
        logprobs = [[-0.5 - 0.001 * token, token, None] for token in output]
        meta = {
            "id": body["rid"],
            "finish_reason": reason,
            "prompt_tokens": len(body["input_ids"]),
            "completion_tokens": len(output),
            "output_token_logprobs": logprobs,
            "output_token_logprobs_length": len(output),
        }
        return {"text": "", "output_ids": output, "meta_info": meta}

    async def _spoiled(self, request: web.Request, reply: dict[str, Any], fault: Fault) -> web.StreamResponse:
        raw, encoding = spoil(reply, fault)
        if fault == "redirect":
            return web.Response(status=307, headers={"Location": "http://127.0.0.1:9/generate"})
        if fault != "truncated":
            return web.Response(body=raw, headers={"Content-Type": "application/json"} | encoding)
        response = web.StreamResponse(headers={"Content-Length": str(len(raw))})
        await response.prepare(request)
        await response.write(raw[: len(raw) // 2])
        assert request.transport is not None
        request.transport.close()
        return response

    async def _abort(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.aborts.append(body.get("rid", ""))
        if body.get("abort_all") or body["rid"] in self.running:  # as the real server: unknown names go no further,
            for rid, running in self.running.items():  # and the others are prefixes
                if body.get("abort_all") or rid.startswith(body["rid"]):
                    running.aborted.set()
        return web.Response()

    async def _checksums(self, request: web.Request) -> web.Response:
        checksums = reported_checksums(self.weights, (await request.json()).get("skip_tensor_list") or [])
        ranks = [{"checksums": checksums, "parallelism_info": [{"role": "target", "tp_rank": 0, "tp_size": 1}]}]
        return web.json_response({"success": True, "message": "Success.", "ranks": ranks})

    async def _flush(self, request: web.Request) -> web.Response:
        return web.Response(status=400 if self.running else 200, text="Cache flushed." if not self.running else "busy")

    async def _release(self, request: web.Request) -> web.Response:
        if self.running or self.released:  # the real server's scheduler ends itself
            self._stopping = asyncio.create_task(self._stop())
        self.released = True
        return web.json_response(None)

    async def _resume(self, request: web.Request) -> web.Response:
        if not self.released:
            self._stopping = asyncio.create_task(self._stop())
        self.released = False
        return web.json_response(None)

    async def _update_from_disk(self, request: web.Request) -> web.Response:
        body = await request.json()
        if self.update_fault == "hang":
            await asyncio.sleep(3600)
        if self.update_fault == "500":
            return _refusal("no", 500)
        try:
            new = served_weights(Path(body["model_path"]))
        except (OSError, ValueError, KeyError) as error:
            return _refusal(f"Failed to get weights iterator: {error}.")
        if self.update_fault == "drops_a_tensor":
            new[_LOST] = self.weights[_LOST]
        self.weights = new
        self.weight_version = body.get("weight_version") or self.weight_version
        return web.json_response({"success": True, "message": "Succeeded to update model weights."})

    async def _update_version(self, request: web.Request) -> web.Response:
        body = await request.json()
        if self.update_fault != "keeps_version":
            self.weight_version = body["new_version"]
        return web.json_response({"success": True, "message": "", "new_version": body["new_version"]})

    async def _begin(self, request: web.Request) -> web.Response:
        if self.in_session:
            return _refusal("a weight-update session is already open; call end_weight_update() first")
        self.in_session = True
        return web.json_response({"success": True, "message": "Success"})

    async def _end(self, request: web.Request) -> web.Response:
        if not self.in_session:
            return _refusal("no weight-update session is open")
        self.in_session = False
        return web.json_response({"success": True, "message": "Success"})

    async def _init_group(self, request: web.Request) -> web.Response:
        body = await request.json()
        if body["backend"] != "gloo":
            return _refusal(f"Failed to initialize custom process group: Invalid backend: '{body['backend']}'")
        if self.group_fault == "joins_and_refuses":  # the connection to the store, not the group
            await asyncio.to_thread(join_store, body)
        if self.group_fault in ("refuses", "joins_and_refuses"):
            return _refusal("Failed to initialize custom process group: no such device")
        if self.group_fault == "none":
            self.groups[body["group_name"]] = await asyncio.to_thread(join_group, body)
        return web.json_response({"success": True, "message": ""})

    async def _destroy_group(self, request: web.Request) -> web.Response:
        known = self.groups.pop((await request.json())["group_name"], None)
        return web.json_response({"success": known is not None, "message": ""}, status=200 if known else 400)

    async def _update_distributed(self, request: web.Request) -> web.Response:
        body = await request.json()
        if self._refuses_updates():
            return _refusal(_OUTSIDE.format("distributed"))
        if self.update_fault == "hang":
            await asyncio.sleep(3600)
        kinds = [np.dtype(NUMPY_DTYPES[name]) for name in body["dtypes"]]
        sizes = [int(np.prod(shape)) * kind.itemsize for shape, kind in zip(body["shapes"], kinds, strict=True)]
        flat = await asyncio.to_thread(receive, self.groups[body["group_name"]], self.buffer(sum(sizes)))
        for name, shape, kind, end, size in zip(
            body["names"], body["shapes"], kinds, np.cumsum(sizes), sizes, strict=True
        ):
            if (end - size) % kind.itemsize:
                return _refusal(f"Unaligned received tensor {name}: byte offset {end - size}, dtype {kind}")
            self.received[name] = flat[end - size : end].view(kind).reshape(shape)
        self.loaded += zip(body["names"], body["dtypes"], strict=True)
        return self._load_received(body)

    async def _update_tensor(self, request: web.Request) -> web.Response:
        body = await request.json()
        if self._refuses_updates():
            return _refusal(_OUTSIDE.format("tensor"))
        if self.update_fault == "hang":
            await asyncio.sleep(3600)
        bucket = AllowListed(io.BytesIO(base64.b64decode(body["serialized_named_tensors"][0], validate=True))).load()
        assert body["load_format"] == "flattened_bucket"
        for meta in bucket["metadata"]:
            kind = str(meta.dtype).removeprefix("torch.")
            raw = bucket["flattened_tensor"].numpy()[meta.start_idx : meta.end_idx]
            self.received[meta.name] = raw.view(NUMPY_DTYPES[kind]).reshape(meta.shape)
            self.loaded.append((meta.name, kind))
        return self._load_received(body)

    def buffer(self, size: int) -> NDArray[Any]:
        """Returns memory for a bucket."""
        return np.empty(size, np.uint8)

    def _refuses_updates(self) -> bool:
        return not (self.in_session or self.legacy) or self.update_fault == "500"

    def _load_received(self, body: dict[str, Any]) -> web.Response:
        if self.update_fault == "drops_a_tensor":
            self.received.pop(_LOST, None)
        self.weights |= joined(self.received)
        self.received = incomplete(self.received)
        self.weight_version = body.get("weight_version") or self.weight_version
        return web.json_response({"success": True, "message": ""})

    def _take_fault(self) -> Fault:
        if self.fault == "none" or self.num_faults == 0:
            return "none"
        self.num_faults -= 1
        return self.fault


def _refusal(message: str, status: int = 400) -> web.Response:
    return web.json_response({"success": False, "message": message}, status=status)


async def _until(event: asyncio.Event, seconds: float) -> None:
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except TimeoutError:
        return


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-path", type=Path, required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--token-s", type=float, default=0.0)
    parser.add_argument("--api-key")
    parser.add_argument("--vocab-size", type=int, default=25)
    parser.add_argument("--aer-key-file", type=Path)  # where it takes the place of the real server's interpreter
    given, _ = parser.parse_known_args()  # the real server has more options
    if given.aer_key_file:
        given.api_key = given.aer_key_file.read_text()
    del given.aer_key_file
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    double = SGLangDouble(**vars(given))
    double.access_log = logging.getLogger("aiohttp.access")  # one line per call, as the real server's
    with double:
        threading.Event().wait()


if __name__ == "__main__":
    main()

"""Rollouts from SGLang servers over HTTP: the ``RolloutEngine`` of runs that do not generate in the trainer's process.

Every request is one /generate call with a name of its own. A call that fails without an answer is repeated on another
server under a new name, after its old name was aborted: sampling has no side effects, so nothing is counted twice. An
answer that cannot be right takes its server out of service (``rollout/fleet.py`` says when it may come back).

    outcome of a call                          server                          request
    connection refused                         out, until a probe succeeds     repeated elsewhere
    connection broken, body cut off, 5xx, 429  out after max_failures in a row repeated
    no answer within request_timeout_s         out, until the next transfer    aborted, repeated elsewhere
    not JSON, NaN, wrong version, wrong counts out, until it is restarted      repeated elsewhere
    400, 422                                   stays                           ValueError
    401, 403                                   stays                           RuntimeError

This file does NOT start servers, transfer weights or import sglang.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import aiohttp

from aer_megatron.rollout.engine import GenerateRequest, SamplingOptions
from aer_megatron.rollout.fleet import Comeback, Server, ServerFleet, describe
from aer_megatron.rollout.sglang_protocol import BadReply, generate_body, parse_completion, parse_json, version_label
from aer_megatron.types import Completion

if TYPE_CHECKING:
    from torch import Tensor

_ABORT_TIMEOUT_S = 2.0  # an abort is a courtesy to the server: nobody waits longer for it
_FIRST_PAUSE_S = 0.05  # before a repetition; doubles each time


class _Failed(Exception):
    """A call that gave no completion and may be repeated."""


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """How long and how often a request is tried; the values live in the configuration's [sglang] section."""

    request_timeout_s: float  # one /generate call
    max_attempts: int  # of one request, over all servers
    max_failures: int  # of a server in a row
    recovery_timeout_s: float  # how long a request waits for a server when none is in service
    probe_interval_s: float  # how often servers out of service are asked whether they are back


class SGLangEngine:
    """A ``RolloutEngine`` over the servers of a fleet; see ``rollout/engine.py`` for the contract.

    Args:
        fleet: the servers; closed by ``close``.
        limits: of every request.
        transfer: publishes weights to the fleet, (tensors, version) -> checksum of every tensor by name.
    """

    def __init__(
        self,
        fleet: ServerFleet,
        limits: RequestLimits,
        *,
        transfer: Callable[[Iterable[tuple[str, Tensor]], int], Mapping[str, int]],
    ) -> None:
        self._fleet = fleet
        self._limits = limits
        self._transfer = transfer
        self._prefix = f"aer-{uuid.uuid4().hex[:8]}"
        self._numbers = itertools.count()

    @property
    def policy_version(self) -> int:
        """Returns the version that the servers in service hold, verified; -1 before the first transfer."""
        return self._fleet.policy_version

    def generate(self, requests: Sequence[GenerateRequest], options: SamplingOptions) -> list[Completion]:
        """Returns one completion per request, in order. An interrupt aborts what the servers are still working on.

        Raises:
            ValueError: a server refuses a request as invalid; the message is the server's.
            RuntimeError: no weights yet, closed, no server left within ``recovery_timeout_s``, or a request that
                failed ``max_attempts`` times; every server's state is named.
        """
        if self._fleet.policy_version < 0:
            raise RuntimeError("the rollout servers have no weights yet; call update_weights first")
        return self._fleet.run(self._generate(requests, options))

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> Mapping[str, int]:
        """Returns the checksum of every tensor that the servers now serve as policy ``version``."""
        return self._transfer(tensors, version)

    def close(self) -> None:
        """Ends the connections; calling it twice is harmless."""
        self._fleet.close()

    async def _generate(self, requests: Sequence[GenerateRequest], options: SamplingOptions) -> list[Completion]:
        completions: dict[int, Completion] = {}
        places = iter(range(len(requests)))

        async def work() -> None:
            for place in places:
                completions[place] = await self._complete(requests[place], options)

        num_workers = len(self._fleet.servers) * self._fleet.options.max_concurrency
        probe = asyncio.create_task(self._probe())
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(len(requests), num_workers)):
                    group.create_task(work())
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        finally:
            probe.cancel()
            await self._fleet.settle()
        return [completions[place] for place in range(len(requests))]

    async def _complete(self, request: GenerateRequest, options: SamplingOptions) -> Completion:
        tried: frozenset[int] = frozenset()
        failures: list[str] = []
        for attempt in range(self._limits.max_attempts):
            server = await self._fleet.acquire(tried, timeout_s=self._limits.recovery_timeout_s)
            if server is None:
                raise RuntimeError(
                    f"no rollout server came into service within sglang.recovery_timeout_s="
                    f"{self._limits.recovery_timeout_s:g}: {self._fleet.describe()}"
                )
            try:
                return await self._attempt(server, request, options)
            except _Failed as failure:
                failures.append(f"server {server.index} ({server.url}): {failure}")
                tried |= {server.index}
            finally:
                self._fleet.release(server)
            await asyncio.sleep(_FIRST_PAUSE_S * 2**attempt)
        raise RuntimeError(f"a request failed sglang.max_attempts={len(failures)} times: " + "; ".join(failures))

    async def _attempt(self, server: Server, request: GenerateRequest, options: SamplingOptions) -> Completion:
        rid = f"{self._prefix}-{next(self._numbers)}"
        body = generate_body(request, options, rid=rid)
        timeout_s = self._limits.request_timeout_s
        try:
            reply = await self._fleet.call(server.index, "/generate", body, timeout_s=timeout_s)
        except asyncio.CancelledError:
            self._abort(server, rid)
            raise
        except TimeoutError:
            self._abort(server, rid)
            raise self._out(server, f"no answer to /generate within {timeout_s:g} s", "transfer") from None
        except aiohttp.ClientConnectorError as error:
            raise self._out(server, describe(error), "probe") from None
        except (aiohttp.ClientError, OSError) as error:
            self._abort(server, rid)
            raise self._failed(server, describe(error), "probe") from None
        if reply.status in (400, 422):
            raise ValueError(f"server {server.index} ({server.url}) refuses a request: {reply.text}")
        if reply.status in (401, 403):
            raise RuntimeError(
                f"server {server.index} ({server.url}) answers {reply.status}: set sglang.api_key_env to the name of "
                "the environment variable that holds its API key"
            )
        if reply.status != 200:
            raise self._failed(server, f"/generate answers {reply.status}: {reply.text}", "transfer")
        try:
            completion = parse_completion(parse_json(reply.body), request, version=self._fleet.policy_version)
        except BadReply as error:
            raise self._out(server, f"it answers garbage: {error}", "restart") from None
        if completion.finish_reason == "abort":
            raise self._failed(server, "the request was aborted on the server", "transfer")
        server.num_failures = 0
        return completion

    def _out(self, server: Server, reason: str, comeback: Comeback) -> _Failed:
        self._fleet.retire(server, reason, comeback)
        return _Failed(reason)

    def _failed(self, server: Server, reason: str, comeback: Comeback) -> _Failed:
        server.num_failures += 1
        if server.in_service and server.num_failures >= self._limits.max_failures:
            text = f"{server.num_failures} calls in a row failed, the last: {reason}"
            self._fleet.retire(server, text, comeback)
        return _Failed(reason)

    def _abort(self, server: Server, rid: str) -> None:
        async def abort() -> None:
            with contextlib.suppress(aiohttp.ClientError, OSError):  # the server is gone, and the request with it
                await self._fleet.call(server.index, "/abort_request", {"rid": rid}, timeout_s=_ABORT_TIMEOUT_S)

        self._fleet.start_background(abort())

    async def _probe(self) -> None:
        """Puts servers that are back, still with the verified version, into service again."""
        while True:
            await asyncio.sleep(self._limits.probe_interval_s)
            for server in self._fleet.servers:
                if not server.in_service and server.comeback == "probe" and await self._is_back(server):
                    self._fleet.admit(server)

    async def _is_back(self, server: Server) -> bool:
        try:
            reply = await self._fleet.call(
                server.index, "/model_info", timeout_s=self._fleet.options.control_timeout_s
            )
        except (aiohttp.ClientError, OSError):
            return False
        table = reply.json()
        return (
            reply.status == 200
            and isinstance(table, Mapping)
            and table.get("weight_version") == version_label(self._fleet.policy_version)
        )

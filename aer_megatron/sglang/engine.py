"""Rollouts from SGLang servers over HTTP: the ``RolloutEngine`` of runs that do not generate in the trainer's process.

Every request is one /generate call with a name of its own. A call that fails without an answer is repeated on another
server under a new name, after its old name was aborted: sampling has no side effects, so nothing is counted twice. An
answer that cannot be right takes its server out of service (``sglang/fleet.py`` says when it may come back).

    outcome of a call                          server                          request
    connection refused                         out, until a probe succeeds     repeated elsewhere
    connection broken, body cut off, 5xx, 429  out after max_failures in a row repeated
    no answer within request_timeout_s         out, until the next transfer    aborted, repeated elsewhere
    not JSON, NaN, wrong version, wrong counts,
    beyond the vocabulary, too long a body     out, until it is restarted      repeated elsewhere
    another run's weights                      out, until a transfer takes it  repeated elsewhere
    aborted by somebody else                   stays                           repeated
    no file descriptors left here              stays                           repeated
    400, 422                                   stays                           ValueError
    401, 403                                   stays                           RuntimeError

A weight transfer interrupts what is under way: every call is aborted, its tokens so far are kept, and afterwards the
request goes on with them behind its prompt. Unlike a paused server's, the continuation reads prompt and tokens with the
new weights alone, it works with every server version, and no transfer waits for a generation.

Behind a router it is not known which server a failure is of, unless the router says so: then all in service are
suspected and tried past the router (the version they carry, one token of the request), and those that fail are treated
by the table. Aborts go to every server.

This file does NOT start servers, transfer weights or import sglang.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace

import aiohttp

from aer_megatron.rollout.engine import GenerateRequest, SamplingOptions
from aer_megatron.sglang.calls import Call, CallFailed, RequestLimits
from aer_megatron.sglang.fleet import Comeback, Server, ServerFleet
from aer_megatron.sglang.protocol import (
    Expected,
    ForeignWeights,
    WeightLabels,
    check_name,
    ended,
    generate_body,
    is_empty_abort,
    join_completions,
    parse_completion,
    parse_partial,
    reply_limit,
    rest_of,
)
from aer_megatron.sglang.replies import BadReply, Reply, UnreadableReply, describe, is_ours, parse_json
from aer_megatron.types import Completion

_LOG = logging.getLogger(__name__)
_MAX_ABORTS = 256  # under way at a time: behind a router each goes to every server
_ABORT_TIMEOUT_S = 2.0  # an abort is a courtesy to the server: nobody waits longer for it
_FIRST_PAUSE_S = 0.05  # before a repetition; doubles each time
_ABORT_AGAIN_S = 0.2  # an abort that overtook its request is not heard of again


class _Enough(Exception):
    """As many groups are whole as were wanted."""


class SGLangEngine:
    """A ``RolloutEngine`` over the servers of a fleet; see ``rollout/engine.py`` for the contract.

    Args:
        fleet: the servers.
        limits: of every request.
        labels: of the weights that this run publishes.
        vocab_size: token ids from it on are no tokens.
    """

    def __init__(self, fleet: ServerFleet, limits: RequestLimits, *, labels: WeightLabels, vocab_size: int) -> None:
        self._fleet = fleet
        self._limits = limits
        self._labels = labels
        self._vocab_size = vocab_size
        self._prefix = f"aer-{uuid.uuid4().hex[:8]}"
        self._numbers = itertools.count()
        self._calls: dict[str, Call] = {}
        self._idle = asyncio.Event()
        self._examining = asyncio.Lock()
        self._aborting = asyncio.Semaphore(_MAX_ABORTS)
        self._examined: dict[int, float] = {}  # when a server was last tried past the router
        fleet.interrupt = self._interrupt

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
        whole = self.generate_first([[request] for request in requests], options, wanted=len(requests))
        return [whole[place][0] for place in range(len(requests))]

    def generate_first(
        self, groups: Sequence[Sequence[GenerateRequest]], options: SamplingOptions, *, wanted: int
    ) -> dict[int, list[Completion]]:
        """Returns the completions of the ``wanted`` groups that are whole first, by index; the others are aborted.

        Groups begin in order, and a server has at most ``max_concurrency`` requests under way: so many groups as fit
        there are unfinished at any time. Raises what ``generate`` raises.
        """
        if self._fleet.policy_version < 0:
            raise RuntimeError("the rollout servers have no weights yet; publish some first")
        return self._fleet.run(self._generate(groups, options, wanted))

    async def _generate(
        self, groups: Sequence[Sequence[GenerateRequest]], options: SamplingOptions, wanted: int
    ) -> dict[int, list[Completion]]:
        completions: list[dict[int, Completion]] = [{} for _ in groups]
        places = iter([(index, place) for index, group in enumerate(groups) for place in range(len(group))])
        whole: list[int] = []

        async def work() -> None:
            for index, place in places:
                completions[index][place] = await self._complete(groups[index][place], options)
                if len(completions[index]) == len(groups[index]):
                    whole.append(index)
                    if len(whole) == wanted:
                        raise _Enough

        num_workers = len(self._fleet.servers) * self._fleet.options.max_concurrency
        num_requests = sum(map(len, groups))
        probe = asyncio.create_task(self._probe())
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(num_requests, num_workers)):
                    group.create_task(work())
        except BaseExceptionGroup as failures:
            if len(whole) < wanted:
                raise failures.exceptions[0] from None
        finally:
            probe.cancel()
            await self._fleet.settle()
        return {index: [completions[index][place] for place in range(len(groups[index]))] for index in whole[:wanted]}

    async def _complete(self, request: GenerateRequest, options: SamplingOptions) -> Completion:
        tried: frozenset[int] = frozenset()
        failures: list[str] = []
        so_far: Completion | None = None
        while len(failures) < self._limits.max_attempts:
            server = await self._fleet.acquire(tried, timeout_s=self._limits.recovery_timeout_s)
            if server is None:
                raise RuntimeError(
                    f"no rollout server came into service within sglang.recovery_timeout_s="
                    f"{self._limits.recovery_timeout_s:g}: {self._fleet.describe()}"
                )
            target = self._fleet.router or server
            rest = rest_of(request, so_far)
            try:
                more = await self._attempt(target, rest, options)
            except CallFailed as failure:
                failures.append(f"{target.name}: {failure}")
                if target is server:
                    tried |= {server.index}
                else:
                    failures[-1] += await self._examine(failure, rest, options)
            else:
                so_far = so_far if more is None else join_completions(so_far, more)
                done = so_far and ended(so_far, request, options)
                if done:
                    return done
                continue  # interrupted by a transfer, after which some server is in service
            finally:
                self._fleet.release(server)
            await asyncio.sleep(_FIRST_PAUSE_S * 2 ** (len(failures) - 1))
        raise RuntimeError(f"a request failed sglang.max_attempts={len(failures)} times: " + "; ".join(failures))

    async def _attempt(self, server: Server, request: GenerateRequest, options: SamplingOptions) -> Completion | None:
        """Returns what the server sampled: whole, or, where a transfer interrupted the call, what there was by then."""
        # SGLang aborts every request whose name begins with the given one: the dot keeps -1 from ending -12
        rid = f"{self._prefix}-{next(self._numbers)}."
        # a transfer changes the version only when no call is under way
        expected = Expected(request, self._fleet.policy_version, self._labels, self._vocab_size)
        body = generate_body(request, options, rid=rid)
        timeout_s = self._limits.request_timeout_s
        try:
            async with asyncio.timeout(timeout_s) as deadline:
                call = self._calls[rid] = Call(server, deadline)
                self._idle.clear()
                reply = await self._fleet.call(
                    server, "/generate", body, timeout_s=timeout_s, max_bytes=reply_limit(request)
                )
        except asyncio.CancelledError:
            self._abort(server, rid)
            raise
        except TimeoutError:
            self._abort(server, rid)
            if call.interrupted:
                timeout_s = self._fleet.options.control_timeout_s
            path = "/abort_request" if call.interrupted else "/generate"
            raise self._out(server, f"no answer to {path} within {timeout_s:g} s", "transfer") from None
        except UnreadableReply as error:
            self._abort(server, rid)
            raise self._out(server, describe(error), "restart") from None
        except (aiohttp.ClientError, OSError) as error:
            raise self._unanswered(server, rid, error) from None
        finally:
            del self._calls[rid]
            if not self._calls:
                self._idle.set()
        if call.interrupted:
            # a request that had not begun is answered with an error
            return parse_partial(reply.json(), expected) if reply.status == 200 else None
        try:
            return self._believed(server, reply, expected, rid)
        except CallFailed as failure:
            failure.answered_by = reply.answered_by
            raise

    def _unanswered(self, server: Server, rid: str, error: aiohttp.ClientError | OSError) -> CallFailed:
        """Returns the failure of a call that broke off, with what it means for the server."""
        if is_ours(error):
            return CallFailed(
                f"this process may open no further connection ({describe(error)}); raise its limit of open files "
                "(ulimit -n), or lower sglang.max_concurrency"
            )
        if isinstance(error, aiohttp.ClientConnectorError):
            self._fleet.retire(server, describe(error), "probe")  # the router, too
            return CallFailed(describe(error))
        self._abort(server, rid)
        return self._failed(server, describe(error), "probe")

    def _believed(self, server: Server, reply: Reply, expected: Expected, rid: str) -> Completion:
        if reply.status in (400, 422) and server is not self._fleet.router:  # a router has other reasons, too
            raise ValueError(f"{server.name} refuses a request: {reply.text}")
        if reply.status in (401, 403):
            raise RuntimeError(
                f"{server.name} answers {reply.status}: set sglang.api_key_env to the name of the environment "
                "variable that holds its API key"
            )
        if reply.status != 200:
            raise self._failed(server, f"/generate answers {reply.status}: {reply.text}", "transfer")
        try:
            table = parse_json(reply.body)
            if is_empty_abort(table):
                raise CallFailed("the request was aborted on the server")
            completion = parse_completion(table, expected)
            check_name(table, rid)
        except ForeignWeights as error:
            raise self._out(server, str(error), "transfer") from None
        except BadReply as error:
            raise self._out(server, f"it answers garbage: {error}", "restart") from None
        if completion.finish_reason == "abort":  # by somebody else: no sign of a fault
            raise CallFailed("the request was aborted on the server")
        server.num_failures = 0
        return completion

    async def _examine(self, failure: CallFailed, request: GenerateRequest, options: SamplingOptions) -> str:
        """Returns which servers may have caused a failure behind the router; those that fail a trial are retired."""
        now = asyncio.get_running_loop().time
        router, began, suspects = self._fleet.router, now(), self._fleet.suspects(failure.answered_by)
        if router is None or not router.in_service or not suspects:
            return ""
        async with self._examining:
            untried = [server for server in suspects if self._examined.get(server.index, -1.0) < began]
            self._examined |= {server.index: now() for server in untried}
            one_token = replace(request, max_new_tokens=1)
            await asyncio.gather(*(self._try(server, one_token, options) for server in untried))
        text = ", from " + " or ".join(server.name for server in suspects)
        if all(server.in_service for server in suspects) and not self._fleet.in_transfer:
            text += (
                "; past the router a trial goes well: it drops fields (smg >= 1.13 passes them), or a server fails now "
                "and then; an empty sglang.router_url does without it"
            )
        if untried:
            _LOG.warning("%s: %s%s", router.name, failure, text)
        return text

    async def _try(self, server: Server, request: GenerateRequest, options: SamplingOptions) -> None:
        """Retires a server that does not carry the verified version or fails ``request``."""
        if not server.in_service or self._fleet.in_transfer:
            return
        if not await self._is_back(server):
            if not self._fleet.in_transfer:  # it may have begun meanwhile
                self._fleet.retire(server, "it does not answer, or not as the verified policy version", "probe")
            return
        if self._fleet.in_transfer or not server.in_service:
            return
        with contextlib.suppress(CallFailed):
            await self._attempt(server, request, options)

    def _out(self, server: Server, reason: str, comeback: Comeback) -> CallFailed:
        if server is not self._fleet.router:
            self._fleet.retire(server, reason, comeback)
        return CallFailed(reason)

    def _failed(self, server: Server, reason: str, comeback: Comeback) -> CallFailed:
        if server is self._fleet.router:
            return CallFailed(reason)
        server.num_failures += 1
        if server.in_service and server.num_failures >= self._limits.max_failures:
            text = f"{server.num_failures} calls in a row failed, the last: {reason}"
            self._fleet.retire(server, text, comeback)
        return CallFailed(reason)

    def _abort(self, server: Server, rid: str) -> None:
        self._fleet.start_background(self._send_abort(server, rid))

    async def _send_abort(self, server: Server, rid: str) -> None:
        """Aborts a call; one to the router at every server, because it may be any of them that has it."""

        async def abort(target: Server) -> None:
            # an error: the server is gone, and the request with it
            async with self._aborting:
                with contextlib.suppress(aiohttp.ClientError, OSError):
                    await self._fleet.call(target, "/abort_request", {"rid": rid}, timeout_s=_ABORT_TIMEOUT_S)

        targets = self._fleet.servers if server is self._fleet.router else [server]
        await asyncio.gather(*map(abort, targets))

    async def _interrupt(self) -> None:
        """Returns when no call is under way; nothing begins meanwhile, because no server is in service."""
        limit = asyncio.get_running_loop().time() + self._fleet.options.control_timeout_s
        for call in self._calls.values():
            call.interrupted = True
            if not call.deadline.expired():
                call.deadline.reschedule(limit)
        while self._calls:
            await asyncio.gather(*(self._send_abort(call.server, rid) for rid, call in list(self._calls.items())))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), _ABORT_AGAIN_S)

    async def _probe(self) -> None:
        """Puts servers that are back, still with the verified version, into service again."""
        while True:
            await asyncio.sleep(self._limits.probe_interval_s)
            router = self._fleet.router
            for server in [*self._fleet.servers, *([router] if router else [])]:
                if server.in_service or server.comeback != "probe" or self._fleet.in_transfer:
                    continue
                back = await self._is_back(server)
                if back and not self._fleet.in_transfer:  # it may have begun meanwhile
                    self._fleet.admit(server)

    async def _is_back(self, server: Server) -> bool:
        path = "/workers" if server is self._fleet.router else "/model_info"
        try:
            reply = await self._fleet.call(server, path, timeout_s=self._fleet.options.control_timeout_s)
        except (aiohttp.ClientError, OSError):
            return False
        if server is self._fleet.router:
            return reply.status == 200
        table = reply.json()
        return (
            reply.status == 200
            and isinstance(table, Mapping)
            and table.get("weight_version") == self._labels.verified(self._fleet.policy_version)
        )

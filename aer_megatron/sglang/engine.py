"""Rollouts from SGLang servers over HTTP: the ``RolloutEngine`` of runs that do not generate in the trainer's process.

Every request is one /generate call with a name of its own. A call that fails without an answer is repeated on another
server under a new name, after its old name was aborted: sampling has no side effects, so nothing is counted twice. An
answer that cannot be right takes its server out of service (``sglang/server_state.py`` says when it may come back).

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
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import aiohttp

from aer_megatron.rollout.engine import GenerateRequest, SamplingOptions
from aer_megatron.sglang.calls import Call, CallFailed, RequestLimits
from aer_megatron.sglang.fleet import ServerFleet
from aer_megatron.sglang.labels import ForeignWeights, WeightLabels
from aer_megatron.sglang.protocol import (
    Expected,
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
from aer_megatron.sglang.router import Router
from aer_megatron.sglang.server_state import Comeback, Server
from aer_megatron.types import Completion

_LOG = logging.getLogger(__name__)
_FIRST_PAUSE_S = 0.05  # before a repetition; doubles each time


class _EnoughGroups(Exception):
    """As many groups are complete as were wanted."""


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
        self._examining = asyncio.Lock()
        self._examined: dict[int, float] = {}  # when a server was last tried past the router

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
        groups = self.generate_first([[request] for request in requests], options, wanted=len(requests))
        return [groups[index][0] for index in range(len(requests))]

    def generate_first(
        self, groups: Sequence[Sequence[GenerateRequest]], options: SamplingOptions, *, wanted: int
    ) -> dict[int, list[Completion]]:
        """Returns the completions of the ``wanted`` groups that are complete first, by index; the others are aborted.

        Groups begin in order, and a server has at most ``max_concurrency`` requests under way: so many groups as fit
        there are unfinished at any time. Raises what ``generate`` raises.
        """
        if self._fleet.policy_version < 0:
            raise RuntimeError("the rollout servers have no weights yet; publish some first")
        return self._fleet.http.run(self._generate(groups, options, wanted))

    async def _generate(
        self, groups: Sequence[Sequence[GenerateRequest]], options: SamplingOptions, wanted: int
    ) -> dict[int, list[Completion]]:
        completions: list[dict[int, Completion]] = [{} for _ in groups]
        queue = iter([(group, sample) for group, requests in enumerate(groups) for sample in range(len(requests))])
        complete: list[int] = []

        async def work() -> None:
            for group, sample in queue:
                completions[group][sample] = await self._complete(groups[group][sample], options)
                if len(completions[group]) == len(groups[group]):
                    complete.append(group)
                    if len(complete) == wanted:
                        raise _EnoughGroups

        num_workers = len(self._fleet.servers) * self._fleet.http.options.max_concurrency
        num_requests = sum(map(len, groups))
        probe = asyncio.create_task(self._probe())
        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(min(num_requests, num_workers)):
                    tasks.create_task(work())
        except BaseExceptionGroup as failures:
            if len(complete) < wanted:
                raise failures.exceptions[0] from None
        finally:
            probe.cancel()
            await self._fleet.http.settle()
        return {
            group: [completions[group][sample] for sample in range(len(groups[group]))] for group in complete[:wanted]
        }

    async def _complete(self, request: GenerateRequest, options: SamplingOptions) -> Completion:
        """Returns the completion of one request, over as many servers, tries and weight transfers as it takes."""
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
        """Returns what the server sampled: all, or, where a transfer interrupted the call, what there was by then."""
        timeout_s = self._limits.request_timeout_s
        call = self._fleet.calls.new(server, timeout_s)
        # a transfer changes the version only when no call is under way
        expected = Expected(request, self._fleet.policy_version, self._labels, self._vocab_size)
        body = generate_body(request, options, rid=call.rid)
        try:
            reply = await self._fleet.calls.generate(call, body, timeout_s=timeout_s, max_bytes=reply_limit(request))
        except TimeoutError:
            path = "/generate"
            if call.interrupted:
                path, timeout_s = "/abort_request", self._fleet.http.options.control_timeout_s
            raise self._retired(server, f"no answer to {path} within {timeout_s:g} s", "transfer") from None
        except UnreadableReply as error:
            raise self._retired(server, describe(error), "restart") from None
        except (aiohttp.ClientError, OSError) as error:
            raise self._unanswered(server, error) from None
        if call.interrupted:
            # a request that had not begun is answered with an error
            return parse_partial(reply.json(), expected) if reply.status == 200 else None
        try:
            return self._checked_completion(call, reply, expected)
        except CallFailed as failure:
            failure.answered_by = reply.answered_by
            raise

    def _unanswered(self, server: Server, error: aiohttp.ClientError | OSError) -> CallFailed:
        """Returns the failure of a call that broke off, with what it means for the server."""
        if is_ours(error):
            return CallFailed(
                f"this process may open no further connection ({describe(error)}); raise its limit of open files "
                "(ulimit -n), or lower sglang.max_concurrency"
            )
        if isinstance(error, aiohttp.ClientConnectorError):
            self._fleet.retire(server, describe(error), "probe")  # the router, too
            return CallFailed(describe(error))
        return self._failed(server, describe(error), "probe")

    def _checked_completion(self, call: Call, reply: Reply, expected: Expected) -> Completion:
        """Returns the completion of a reply; raises for a reply that is none, after what it means for the server."""
        server = call.server
        if reply.status in (400, 422) and not isinstance(server, Router):  # a router has other reasons, too
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
            check_name(table, call.rid)
        except ForeignWeights as error:
            raise self._retired(server, str(error), "transfer") from None
        except BadReply as error:
            raise self._retired(server, f"it answers garbage: {error}", "restart") from None
        if completion.finish_reason == "abort":  # by somebody else: no sign of a fault
            raise CallFailed("the request was aborted on the server")
        server.num_failures = 0
        return completion

    async def _examine(self, failure: CallFailed, request: GenerateRequest, options: SamplingOptions) -> str:
        """Returns which servers may have caused a failure behind the router; those that fail a trial are retired."""
        router, now = self._fleet.router, asyncio.get_running_loop().time
        if router is None:
            return ""
        router.forget()
        began, suspects = now(), self._fleet.suspects(failure.answered_by)
        if not router.in_service or not suspects:
            return ""
        # each suspect is tried once, however many requests failed meanwhile
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

    def _retired(self, server: Server, reason: str, comeback: Comeback) -> CallFailed:
        """Returns the failure of a call for which its server is taken out of service; a router stays."""
        if not isinstance(server, Router):
            self._fleet.retire(server, reason, comeback)
        return CallFailed(reason)

    def _failed(self, server: Server, reason: str, comeback: Comeback) -> CallFailed:
        """Returns the failure of a call; ``max_failures`` in a row take a server out of service."""
        if not isinstance(server, Router):
            server.num_failures += 1
            if server.in_service and server.num_failures >= self._limits.max_failures:
                text = f"{server.num_failures} calls in a row failed, the last: {reason}"
                self._fleet.retire(server, text, comeback)
        return CallFailed(reason)

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
        """Returns whether a server answers as the verified version, or the router at all."""
        path = "/workers" if isinstance(server, Router) else "/model_info"
        try:
            reply = await self._fleet.http.call(server.url + path)
        except (aiohttp.ClientError, OSError):
            return False
        if isinstance(server, Router) or reply.status != 200:
            return reply.status == 200
        table, label = reply.json(), self._labels.verified(self._fleet.policy_version)
        return isinstance(table, Mapping) and table.get("weight_version") == label

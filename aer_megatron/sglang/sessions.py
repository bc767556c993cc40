"""What the transports that stream weights into a server have in common: its update session.

Servers from 0.5.21 load only between /begin_weight_update and /end_weight_update; older ones answer 404 to it and need
none. A transfer that fails leaves no session open, as far as the server still answers.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from aer_megatron.sglang.fleet import ServerFleet
from aer_megatron.sglang.weight_sync import Published, ServerSync, SyncContext, Untransferred

FAREWELL_S = 5.0  # for the calls that tidy up a server after a failure
_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")


class SessionSync(ServerSync):
    """A transport whose servers load inside a session. Nothing is kept of the weights."""

    def __init__(self, fleet: ServerFleet, context: SyncContext) -> None:
        super().__init__(fleet, context)
        self._has_sessions: dict[int, bool] = {}

    def _resend(self, index: int, published: Published) -> None:
        raise Untransferred("it is given weights with the next publication: this transport keeps none")

    def _send_each(
        self, items: Iterator[_T], send: Callable[[_T, int], None], indices: Sequence[int]
    ) -> dict[int, str]:
        """Returns the reasons of the servers that failed to take an item; the next is made while one is under way."""
        refused: dict[int, str] = {}
        with ThreadPoolExecutor(1, thread_name_prefix="weight-transfer") as sender:
            under_way: Future[dict[int, str]] | None = None
            for item in items:
                refused |= under_way.result() if under_way else {}
                alive = [index for index in indices if index not in refused]
                under_way = sender.submit(self._in_parallel, functools.partial(send, item), alive)
            refused |= under_way.result() if under_way else {}
        return refused

    def _begin(self, index: int) -> None:
        """Begins a session where the server has them; one that was left open is ended first."""
        reply = self._control(index, "/begin_weight_update", {})
        if reply.status == 400:
            self._control(index, "/end_weight_update", {})
            reply = self._control(index, "/begin_weight_update", {})
        self._has_sessions[index] = reply.status != 404
        if reply.status not in (200, 404):
            raise Untransferred(f"/begin_weight_update answers {reply.status}: {reply.text}")

    def _end(self, index: int) -> None:
        if self._has_sessions[index]:
            self._post(index, "/end_weight_update", {})

    def _leave_no_session(self, index: int) -> None:
        if self._has_sessions.get(index):
            self._farewell(index, "/end_weight_update", {})

    def _farewell(self, index: int, path: str, body: Mapping[str, Any]) -> None:
        """Makes a call whose failure changes nothing any more."""
        try:
            self._fleet.control(index, path, body, timeout_s=FAREWELL_S)
        except RuntimeError as error:
            _LOG.debug("server %d: %s", index, error)

    def _control(self, index: int, path: str, body: Mapping[str, Any]) -> Any:
        return self._fleet.control(index, path, body, timeout_s=self._context.timeout_s)

"""One /generate call: what is known of it while it is under way, how it fails, and how long it may take."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from aer_megatron.sglang.fleet import Server


class CallFailed(Exception):
    """A call that gave no completion and may be repeated; ``answered_by``: the server that a router names."""

    def __init__(self, reason: str, answered_by: str | None = None) -> None:
        super().__init__(reason)
        self.answered_by = answered_by


@dataclass(slots=True)
class Call:
    """A call under way."""

    server: Server
    deadline: asyncio.Timeout
    interrupted: bool = False


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """How long and how often a request is tried; the values live in the configuration's [sglang] section."""

    request_timeout_s: float  # one /generate call
    max_attempts: int  # of one request, over all servers
    max_failures: int  # of a server in a row
    recovery_timeout_s: float  # how long a request waits for a server when none is in service
    probe_interval_s: float  # how often servers out of service are asked whether they are back

"""What came of an HTTP call to a server or a router."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import aiohttp


class Reply(NamedTuple):
    """An HTTP status and the body as it came."""

    status: int
    body: bytes
    answered_by: str | None  # address of the server behind a router that says so

    def json(self) -> Any:
        """Returns the decoded body, None where it is not JSON."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None

    @property
    def text(self) -> str:
        """The message of an error reply, shortened."""
        table = self.json()
        for key in ("message", "error", "detail"):
            if isinstance(table, Mapping) and table.get(key):
                inner = table[key]
                return str(inner.get("message", inner) if isinstance(inner, Mapping) else inner)[:500]
        return self.body.decode("utf-8", "replace")[:500]


def describe(error: BaseException) -> str:
    """Returns what happened to a connection, in words."""
    text = str(error) or type(error).__name__
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"connection refused or impossible ({text})"
    if isinstance(error, aiohttp.ClientPayloadError):
        return f"the body was cut off ({text})"
    return f"the connection broke ({text})"

"""What came of an HTTP call to a server or a router: read within a limit, decoded as plain JSON, shown in short.

Whoever answers is not trusted: a body is read as it is, up to a limit that the request implies, and anything that JSON
cannot be (too deep, too long a number) is a ``BadReply``, never another exception.
"""

from __future__ import annotations

import asyncio
import errno
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import aiohttp
from aiohttp.client_proto import ResponseHandler

_MAX_INTERIM = 8
_SHOWN_CHARACTERS = 500  # of a server's words in a message


class BadReply(ValueError):
    """A server's reply that cannot be what was asked for; the message says what is wrong with it."""


class UnreadableReply(aiohttp.ClientPayloadError):
    """A body that was not read: too long, or in an encoding that was not asked for."""


class Reply(NamedTuple):
    """An HTTP status and the body as it came."""

    status: int
    body: bytes
    answered_by: str | None  # address of the server behind a router that says so

    def json(self) -> Any:
        """Returns the decoded body, None where it is not JSON."""
        try:
            return parse_json(self.body)
        except BadReply:
            return None

    @property
    def text(self) -> str:
        """The message of an error reply, on one line, shortened."""
        table = self.json()
        for key in ("message", "error", "detail"):
            if isinstance(table, Mapping) and table.get(key):
                inner = table[key]
                inner = inner.get("message", inner) if isinstance(inner, Mapping) else inner
                return printable(inner) if isinstance(inner, str) else shown(inner)
        return printable(self.body[: 4 * _SHOWN_CHARACTERS].decode("utf-8", "replace"))


def parse_json(raw: bytes) -> Any:
    """Returns the decoded body; raises BadReply where it is not JSON, nests too deep or has a number too long."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        cause = "nested too deep" if isinstance(error, RecursionError) else printable(str(error))
        raise BadReply(f"the body is not JSON ({cause}; {len(raw)} bytes)") from None


def shown(value: Any) -> str:
    """Returns a value of a reply for a message: one line, short whatever it is."""
    if isinstance(value, str):
        return repr(printable(value[:80]))
    if isinstance(value, (list, Mapping)):
        return f"a {'list' if isinstance(value, list) else 'table'} of {len(value)}"
    return repr(value)[:80]


def printable(text: str) -> str:
    """Returns a server's words on one line and shortened, without control characters."""
    return "".join(mark if mark.isprintable() else " " for mark in text[:_SHOWN_CHARACTERS])


class FinalAnswers(ResponseHandler):
    """Connections to servers whose answers come after at most a few interim ones, which nobody asked for.

    aiohttp skips interim answers (100 Continue) however many come, without giving anything else a turn.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self._num_interim = 0

    async def read(self) -> Any:
        """Returns the head of the next answer; raises UnreadableReply after too many interim ones."""
        message, payload = await super().read()
        self._num_interim = self._num_interim + 1 if 100 <= message.code < 200 else 0
        if self._num_interim > _MAX_INTERIM:
            raise UnreadableReply(f"more than {_MAX_INTERIM} interim answers came and no other")
        return message, payload


async def read_body(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """Returns the body, of at most ``limit`` bytes, as it travelled.

    Raises:
        UnreadableReply: it is longer, or compressed, which nobody asked for; the connection is closed.
        aiohttp.ClientError, OSError: it did not come whole.
    """
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding.lower() != "identity":
        response.close()
        raise UnreadableReply(f"the body has the encoding {shown(encoding)}, which was not asked for")
    pieces: list[bytes] = []
    size = 0
    while piece := await response.content.readany():
        pieces.append(piece)
        size += len(piece)
        if size > limit:
            response.close()
            raise UnreadableReply(f"the body is longer than the {limit} bytes that an answer can have")
    return b"".join(pieces)


def describe(error: BaseException) -> str:
    """Returns what happened to a connection, in words."""
    text = str(error) or type(error).__name__
    if isinstance(error, UnreadableReply):
        return text
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"connection refused or impossible ({text})"
    if isinstance(error, aiohttp.ClientPayloadError):
        return f"the body was cut off ({printable(text)})"
    return f"the connection broke ({printable(text)})"


def is_ours(error: BaseException) -> bool:
    """Returns whether a connection failed for want of file descriptors here, which says nothing of the server."""
    inner = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    return isinstance(inner, OSError) and inner.errno in (errno.EMFILE, errno.ENFILE)

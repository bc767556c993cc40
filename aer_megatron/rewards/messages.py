"""Messages between the trainer and a verifier process: four bytes of length, then JSON; nothing is ever unpickled.

    trainer -> worker    {"load": name}
                         {"judge": name, "number": n, "text": text, "prompt": encoded}
    worker -> trainer    {"loaded": name} or {"failed": name, "cause": text}
                         {"number": n, "reward": r, "reason": label} and, where the verifier raised, "cause"

``number`` is drawn at random for every job: what an earlier verifier left behind cannot answer a later job.

This file does NOT believe a worker: ``Channel`` bounds the size of what it sends, and never waits for it.
"""

from __future__ import annotations

import dataclasses
import json
import socket
import struct
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from aer_megatron.rewards.labels import to_label
from aer_megatron.types import Prompt, Verdict

MAX_FROM_WORKER = 1 << 16
MAX_REWARD = 1e6  # beyond it sums of squares lose what distinguishes rewards
_MAX_TO_WORKER = 1 << 30
_LENGTH = struct.Struct("!I")
_CHUNK = 1 << 16


class Garbage(Exception):
    """What came from a worker process is no message."""


def frame(message: Mapping[str, Any]) -> bytes:
    """Returns the bytes of a message."""
    body = json.dumps(message, separators=(",", ":")).encode()
    return _LENGTH.pack(len(body)) + body


class Channel:
    """The trainer's end of a worker's socket; no call waits."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._socket = end
        self._outgoing = memoryview(b"")
        self._incoming = bytearray()

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    @property
    def has_outgoing(self) -> bool:
        return bool(self._outgoing)

    def send(self, message: bytes) -> None:
        """Takes a framed message and sends what the socket takes at once; ``flush`` sends the rest.

        A closed other end shows at the next ``receive``.
        """
        self._outgoing = memoryview(bytes(self._outgoing) + message)
        with suppress(OSError):
            self.flush()

    def flush(self) -> None:
        """Sends what the socket takes now.

        Raises:
            OSError: the other end is closed.
        """
        while self._outgoing:
            try:
                sent = self._socket.send(self._outgoing)
            except BlockingIOError:
                return
            self._outgoing = self._outgoing[sent:]

    def receive(self) -> dict[str, Any] | None:
        """Returns the next message if it is there as a whole, else None.

        Raises:
            EOFError: the other end is closed.
            OSError: the connection is broken.
            Garbage: it is longer than 64 KiB or no JSON object.
        """
        message = self._next()
        if message is None and self._read():
            message = self._next()
        return message

    def has_stray_bytes(self) -> bool:
        """Whether anything came that nobody asked for; raises as ``receive`` does."""
        return bool(self._incoming) or self._read()

    def _read(self) -> bool:
        try:
            data = self._socket.recv(_CHUNK)
        except BlockingIOError:
            return False
        if not data:
            raise EOFError
        self._incoming += data
        return True

    def _next(self) -> dict[str, Any] | None:
        if len(self._incoming) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._incoming)
        if length > MAX_FROM_WORKER:
            raise Garbage(f"a message of {length} bytes; at most {MAX_FROM_WORKER} are read")
        end = _LENGTH.size + length
        if len(self._incoming) < end:
            return None
        body = bytes(self._incoming[_LENGTH.size : end])
        del self._incoming[:end]
        return _parse(body)


class WorkerChannel:
    """The worker's end: waits."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    def send(self, message: Mapping[str, Any]) -> None:
        self._socket.sendall(frame(message))

    def receive(self) -> dict[str, Any]:
        """Returns the next message.

        Raises:
            EOFError: the trainer closed its end.
            Garbage: it is no message.
        """
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
        if length > _MAX_TO_WORKER:
            raise Garbage(f"a message of {length} bytes")
        return _parse(self._exactly(length))

    def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            part = self._socket.recv(min(size - len(data), 1 << 20))
            if not part:
                raise EOFError
            data += part
        return bytes(data)


def _parse(body: bytes) -> dict[str, Any]:
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Garbage(f"no JSON: {error}") from None
    if not isinstance(message, dict):
        raise Garbage(f"a JSON {type(message).__name__}, not an object")
    return message


def frame_job(verifier: str, number: int, text: str, prompt: str) -> bytes:
    """Returns the bytes of a job; ``prompt`` is what ``encode_prompt`` returned, once for all its rollouts."""
    head = json.dumps({"judge": verifier, "number": number, "text": text}, separators=(",", ":"))
    body = f'{head[:-1]},"prompt":{prompt}}}'.encode()
    return _LENGTH.pack(len(body)) + body


def read_verdict(message: Mapping[str, Any], number: int) -> Verdict:
    """Returns the verdict of a worker's message on job ``number``.

    Raises:
        Garbage: it is on another job, or no verdict.
    """
    if message.get("number") != number:
        raise Garbage("it is on another job")
    reward, reason = message.get("reward"), message.get("reason")
    if isinstance(reward, bool) or not isinstance(reward, int | float) or not abs(reward) <= MAX_REWARD:
        raise Garbage("no reward")
    if not isinstance(reason, str):
        raise Garbage("no reason")
    return Verdict(float(reward), to_label(reason))


def encode_prompt(prompt: Prompt) -> str:
    """Returns a prompt as JSON that ``decode_prompt`` makes an equal one of.

    Raises:
        ValueError: its metadata holds what has no JSON form here, or is nested too deeply.
    """
    try:
        metadata = _encode(dict(prompt.metadata))
    except (TypeError, RecursionError) as error:
        raise ValueError(
            f"metadata of prompt {prompt.id} cannot be sent to a verifier process: {error}; use JSON values, tuples "
            "and sets"
        ) from None
    fields = {field.name: getattr(prompt, field.name) for field in dataclasses.fields(prompt)}
    return json.dumps(fields | {"metadata": metadata}, separators=(",", ":"))


def decode_prompt(encoded: Mapping[str, Any]) -> Prompt:
    """Returns the prompt whose JSON is ``encoded``."""
    own = {"token_ids": tuple(encoded["token_ids"]), "metadata": _decode(encoded["metadata"])}
    return Prompt(**{**encoded, **own})


def _encode(value: Any) -> Any:
    """JSON whose every object has one key that says what it stands for: scorers tell tuples from lists, 1 from "1"."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return _encode(value.item())
    if isinstance(value, list):
        return [_encode(item) for item in value]
    if isinstance(value, tuple | set | frozenset):
        kind = next(base for base in (tuple, set, frozenset) if isinstance(value, base))
        return {kind.__name__: [_encode(item) for item in value]}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {"dict": {key: _encode(item) for key, item in value.items()}}
        return {"pairs": [[_encode(key), _encode(item)] for key, item in value.items()]}
    raise TypeError(f"it holds a {type(value).__name__}")


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "dict":
        return {key: _decode(item) for key, item in content.items()}
    if kind == "pairs":
        return {_decode(key): _decode(item) for key, item in content}
    return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind](_decode(item) for item in content)

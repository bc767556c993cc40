"""The program of one verifier process: load verifiers, judge one answer at a time (messages: rewards/messages.py).

This file does NOT limit the time of an answer: rewards/pool.py ends a worker that overruns. Nor does it end with the
trainer by itself: rewards/guard.py sees to that.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import socket
from typing import Any

from aer_megatron.rewards.labels import error_label
from aer_megatron.rewards.messages import Garbage, WorkerChannel, decode_prompt
from aer_megatron.rewards.registry import VerifyFunction, attempt_anything, load_verifier, to_verdict

_CAUSE_LENGTH = 300


def run_worker(descriptor: int, timeout_s: float, memory_mb: int) -> None:
    """Answers messages on the inherited socket ``descriptor`` until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's business; it closes the socket
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # its timeouts are verdicts, not log lines
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    own_pid = os.getpid()
    verifiers: dict[str, VerifyFunction] = {}
    with socket.socket(fileno=descriptor) as end:
        channel = WorkerChannel(end)
        while True:
            try:
                message = channel.receive()
            except (EOFError, OSError, Garbage):
                return
            reply = _load(message["load"], verifiers, timeout_s) if "load" in message else _judge(message, verifiers)
            if os.getpid() != own_pid:
                os._exit(0)  # a verifier forked, and its child came back here: the answer is the parent's to give
            if "load" in message:
                _limit_memory(memory_mb)
            try:
                channel.send(reply)
            except OSError:
                return


def _load(name: str, verifiers: dict[str, VerifyFunction], timeout_s: float) -> dict[str, Any]:
    function, error = attempt_anything(lambda: load_verifier(name, timeout_s))
    if error is not None:
        return {"failed": name, "cause": str(error) if isinstance(error, ValueError) else _cause(error)}
    verifiers[name] = function
    return {"loaded": name}


def _judge(message: dict[str, Any], verifiers: dict[str, VerifyFunction]) -> dict[str, Any]:
    number, prompt = message["number"], decode_prompt(message["prompt"])
    verify = verifiers[message["judge"]]
    verdict, error = attempt_anything(lambda: to_verdict(verify(message["text"], prompt)))
    if error is not None:
        return {"number": number, "reward": 0.0, "reason": error_label(error), "cause": _cause(error)}
    return {"number": number, "reward": verdict.reward, "reason": verdict.reason}


def _cause(error: BaseException) -> str:
    """Returns what was raised, and where."""
    text, failure = attempt_anything(lambda: f"{type(error).__name__}: {error}"[:_CAUSE_LENGTH])
    where = error.__traceback__
    while where is not None and where.tb_next is not None:
        where = where.tb_next
    place = "" if where is None else f" ({where.tb_frame.f_code.co_filename}, line {where.tb_lineno})"
    return (text if failure is None else type(error).__name__) + place


def _limit_memory(memory_mb: int) -> None:
    """Bounds the address space at ``memory_mb`` MiB beyond what is held now, the loaded verifiers; 0 is no bound."""
    if not memory_mb:
        return
    with open("/proc/self/statm", encoding="ascii") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = held + (memory_mb << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))

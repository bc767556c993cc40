"""The program of one verifier process: load verifiers, judge one answer at a time, end with the trainer.

Messages in: ``("load", name)``, ``("judge", name, text, prompt)``. Messages out: ``("loaded", name)``,
``("failed", name, reason)``, ``("verdict", Verdict)``.

This file does NOT limit the time of an answer from outside: rewards/pool.py kills a worker that overruns.
"""

from __future__ import annotations

import logging
import math
import os
import resource
import signal
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

from aer_megatron.rewards.registry import VerifyFunction, attempt, find_verifier, judge
from aer_megatron.types import Verdict

_PARENT_POLL_S = 1.0
_CPU_MARGIN_S = 5


def run_worker(file_descriptor: int, parent_pid: int, timeout_s: float) -> None:
    """Answers messages on the inherited socket ``file_descriptor`` until it closes or the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's business; it closes the socket
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # its timeouts are verdicts, not log lines
    threading.Thread(target=_exit_with_parent, args=(parent_pid,), daemon=True).start()
    verifiers: dict[str, VerifyFunction] = {}
    with Connection(file_descriptor) as connection:
        while True:
            try:
                message = connection.recv()
            except (EOFError, OSError):
                return
            connection.send(_answer(message, verifiers, timeout_s))


def _answer(
    message: tuple[Any, ...], verifiers: dict[str, VerifyFunction], timeout_s: float
) -> tuple[Any, ...]:
    kind, name, *rest = message
    if kind == "load":
        function, error = attempt(lambda: find_verifier(name).load(timeout_s))
        if error is not None:
            return ("failed", name, f"{type(error).__name__}: {error}")
        verifiers[name] = function
        return ("loaded", name)
    text, prompt = rest
    _limit_cpu_time(timeout_s)
    verdict = judge(verifiers[name], text, prompt)
    return ("verdict", verdict or Verdict(0.0, "verifier_error:TypeError"))  # None is no answer here


def _limit_cpu_time(timeout_s: float) -> None:
    """Lets the kernel end this process if the parent dies during an answer that never returns to Python."""
    cores = os.cpu_count() or 1
    limit = math.ceil(time.process_time() + (timeout_s + _CPU_MARGIN_S) * cores)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_CPU, (limit, hard))


def _exit_with_parent(parent_pid: int) -> None:
    while os.getppid() == parent_pid:
        time.sleep(_PARENT_POLL_S)
    os._exit(1)

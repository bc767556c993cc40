"""Run one function on N gloo ranks and hand back what every rank returned."""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_GRACE_S = 5.0


def _entry(
    sender: Connection,
    init_file: str,
    rank: int,
    world_size: int,
    timeout_s: float,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{init_file}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
        # Pickled here rather than by `send`, so that an unpicklable result is reported with a traceback.
        message = (True, pickle.dumps(fn(rank, world_size, *args)))
    except BaseException:  # reported to the parent, which raises it; a child has nobody else to tell
        message = (False, pickle.dumps(traceback.format_exc()))
    sender.send(message)
    sender.close()
    if message[0] and dist.is_initialized():
        dist.destroy_process_group()


def _collect(
    receivers: dict[Connection, int], processes: list[BaseProcess], deadline: float, timeout_s: float
) -> list[Any]:
    """Return the results in rank order; raises as soon as one rank fails, dies or is late."""
    results: list[Any] = [None] * len(processes)
    while receivers:
        ready = wait(list(receivers), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            late = sorted(receivers.values())
            raise TimeoutError(f"ranks {late} of {len(processes)} gave no result within {timeout_s:g} s")
        for receiver in ready:
            assert isinstance(receiver, Connection)
            rank = receivers.pop(receiver)
            try:
                succeeded, payload = receiver.recv()
            except EOFError:
                processes[rank].join(_GRACE_S)
                raise RuntimeError(f"rank {rank} died, exit code {processes[rank].exitcode}") from None
            if not succeeded:
                raise RuntimeError(f"rank {rank} of {len(processes)} failed:\n{pickle.loads(payload)}")
            results[rank] = pickle.loads(payload)
    return results


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120) -> list[Any]:
    """Return `[fn(0, world_size, *args), fn(1, ...), ...]`, each call on its own gloo process.

    `fn` must be a module-level function; it, `args` and its result must be picklable (return CPU tensors or
    plain numbers). The default process group is initialised before the call and destroyed after it; every
    rank runs with one thread. The parent raises RuntimeError with the traceback of the first rank that
    failed, and TimeoutError when a rank is still busy after `timeout_s` seconds; it then ends the ranks it
    started.
    """
    context = multiprocessing.get_context("spawn")
    deadline = time.monotonic() + timeout_s
    processes: list[BaseProcess] = []
    receivers: dict[Connection, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        init_file = str(Path(folder) / "rendezvous")
        try:
            for rank in range(world_size):
                receiver, sender = context.Pipe(duplex=False)
                process: BaseProcess = context.Process(
                    target=_entry,
                    args=(sender, init_file, rank, world_size, timeout_s, fn, args),
                    daemon=True,
                )
                process.start()
                sender.close()
                processes.append(process)
                receivers[receiver] = rank
            results = _collect(receivers, processes, deadline, timeout_s)
            for process in processes:
                process.join(max(_GRACE_S, deadline - time.monotonic()))
            return results
        finally:
            for process in processes:
                if process.is_alive():
                    process.terminate()
                    process.join(_GRACE_S)

"""Works done beside the main thread: generation, which waits for servers. Whatever ranks do together stays with it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from aer_megatron.loop.parts import Begin


@contextmanager
def beside(name: str) -> Iterator[Begin]:
    """Gives what begins a work at once, behind those begun before, in the thread ``name``.

    A work that is under way at the end, or at an error, is left to the engine's ``close``.
    """
    worker = ThreadPoolExecutor(1, thread_name_prefix=name)
    try:
        yield lambda work: worker.submit(work).result
    finally:
        # not waited for: it may be in the middle of a generation, which ends when the engine is closed
        worker.shutdown(wait=False, cancel_futures=True)

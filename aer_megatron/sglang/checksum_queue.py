"""Checksums of a stream of tensors, computed beside it or after it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

from torch import Tensor


class ChecksumQueue:
    """Calls ``add`` with every tensor of a stream, in order, in a thread of its own; a ``with`` block ends that.

    That is put off until ``finish``, or until ``max_bytes`` wait: those who took the stream compute as many checksums
    when it ends, so nothing is lost by computing ours then, and the transfer has the cores to itself.

    Args:
        add: takes (name, tensor).
        max_bytes: of tensors (or one) that are put off, and as many again that the thread is given.
    """

    def __init__(self, add: Callable[[str, Tensor], None], *, max_bytes: int) -> None:
        self._add = add
        self._max_bytes = max_bytes
        self._waiting: deque[tuple[str, Tensor]] = deque()
        self._busy: deque[tuple[Future[None], int]] = deque()  # handed to the thread
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="weight-checksums")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()

    def stream(self, named_tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yields the stream; its end may come before ``add`` has seen all of it."""
        waiting = busy = 0
        for name, tensor in named_tensors:
            self._waiting.append((name, tensor))
            waiting += tensor.nbytes
            while waiting > self._max_bytes and len(self._waiting) > 1:
                size = self._start()
                waiting, busy = waiting - size, busy + size
            while busy > self._max_bytes and len(self._busy) > 1:
                busy -= self._take()
            yield name, tensor

    def finish(self) -> None:
        """Waits until ``add`` is done with everything; raises what it raised."""
        while self._waiting:
            self._start()
        while self._busy:
            self._take()

    def _start(self) -> int:
        name, tensor = self._waiting.popleft()
        self._busy.append((self._pool.submit(self._add, name, tensor), tensor.nbytes))
        return tensor.nbytes

    def _take(self) -> int:
        future, size = self._busy.popleft()
        future.result()
        return size

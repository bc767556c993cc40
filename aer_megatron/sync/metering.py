"""Checksums of a stream of tensors, computed beside it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from torch import Tensor


class Meter:
    """Calls ``add`` with every tensor of a stream, in order, in a thread of its own; a ``with`` block ends that.

    Args:
        add: takes (name, tensor).
        max_bytes: of tensors (or one) that may wait for that thread.
    """

    def __init__(self, add: Callable[[str, Tensor], None], *, max_bytes: int) -> None:
        self._add = add
        self._max_bytes = max_bytes
        self._waiting: deque[tuple[Future[None], int]] = deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="weight-checksums")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()

    def stream(self, named_tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yields the stream; its end may come before ``add`` is done with it."""
        size = 0
        for name, tensor in named_tensors:
            self._waiting.append((self._pool.submit(self._add, name, tensor), tensor.nbytes))
            size += tensor.nbytes
            while size > self._max_bytes and len(self._waiting) > 1:
                size -= self._take()
            yield name, tensor

    def finish(self) -> None:
        """Returns when ``add`` is done with everything; raises what it raised."""
        while self._waiting:
            self._take()

    def _take(self) -> int:
        future, size = self._waiting.popleft()
        future.result()
        return size

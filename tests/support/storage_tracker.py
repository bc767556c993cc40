"""Peak bytes of real tensor storages during a block of code, on any device, without an allocator's help."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


class StorageTracker(TorchDispatchMode):
    """Counts every live storage that an operator reads or writes; views and in-place results count once.

    Storages of `exclude` are not counted: give it what exists anyway, such as weights. Memory that an
    operator allocates and frees inside itself is not seen. `peak_bytes` is the largest sum of live storages
    so far.
    """

    def __init__(self, *exclude: Tensor) -> None:
        super().__init__()
        self._excluded = {t.untyped_storage()._cdata for t in exclude}
        self._kept = exclude  # a freed storage's address could be handed out again
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak_bytes = 0

    @property
    def live_bytes(self) -> int:
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        return sum(size for _, size in self._live.values())

    def track(self, *tensors: Tensor) -> None:
        """Counts tensors that existed before the block."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._excluded:
                self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.track(*_tensors(args), *_tensors(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        self.track(*_tensors(result))
        return result

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)

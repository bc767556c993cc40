"""Small JSON values between ranks outside of the order of collectives: for threads that work beside training.

Values go through the store that the process group was formed with. A collective of such a thread could meet one of the
main thread; a key of a store cannot. This file does NOT know what the values mean.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.002, 0.1


class Mailbox:
    """This rank's connection, for one thread at a time. Topics must be new with every call, the same on all ranks."""

    def __init__(self) -> None:
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._store: Any = None
        if self._world_size > 1:
            store: Any = dist.distributed_c10d._get_default_store()
            self._store = store.clone()

    def gather(self, topic: str, value: Any, *, cancelled: Callable[[], bool]) -> list[Any]:
        """Returns every rank's value, in rank order, on rank 0 once all have come; an empty list at once elsewhere.

        Raises:
            RuntimeError: the store is gone, or ``cancelled`` said so while values were missing.
        """
        if self._rank != 0:
            self._store.set(f"{topic}/{self._rank}", json.dumps(value))
            return []
        others = [self._take(f"{topic}/{rank}", cancelled) for rank in range(1, self._world_size)]
        return [value, *others]

    def broadcast(self, topic: str, value: Any, *, cancelled: Callable[[], bool]) -> Any:
        """Returns rank 0's value on every rank; errors as in ``gather``."""
        if self._rank != 0:
            return self._take(topic, cancelled)
        if self._store is not None:
            self._store.set(topic, json.dumps(value))
        return value

    def _take(self, key: str, cancelled: Callable[[], bool]) -> Any:
        wait_s = _FIRST_WAIT_S
        while not self._store.check([key]):
            if cancelled():
                raise RuntimeError(f"{key}: given up, another rank has not answered")
            time.sleep(wait_s)
            wait_s = min(1.5 * wait_s, _LONGEST_WAIT_S)
        return json.loads(self._store.get(key))

"""Restarts the servers of this run that end, or that are to be replaced.

    watched: dead or to be replaced -> restarted -> ready -> restored

A restarted server starts with the weights of the model folder; ``WeightPublisher.restore`` gives it the current ones
before it carries their version, so it cannot serve anything else.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Self

from aer_megatron.sglang.publication import WeightPublisher
from aer_megatron.sglang.server import POLL_S, ServerGroup

_LOG = logging.getLogger(__name__)


class Supervisor:
    """Watches the servers of ``group``, each from a thread of its own; a ``with`` block ends that."""

    def __init__(self, group: ServerGroup) -> None:
        self._group = group
        self._restarts = [0] * len(group.processes)
        self._watchers: list[threading.Thread] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._group.closing.set()
        for watcher in self._watchers:
            watcher.join()

    def watch(self, publisher: WeightPublisher | None) -> None:
        """Starts restarting servers; ``publisher`` gives them the current weights, None = nobody does."""
        for index in range(len(self._group.processes)):
            watcher = threading.Thread(
                target=self._watch, args=(index, publisher), name=f"sglang-supervisor-{index}", daemon=True
            )
            watcher.start()
            self._watchers.append(watcher)

    def _watch(self, index: int, publisher: WeightPublisher | None) -> None:
        process = self._group.processes[index]
        while not self._group.closing.wait(POLL_S):
            is_to_go = not process.is_alive or index in self._group.to_replace
            if is_to_go and self._restarts[index] < self._group.options.max_restarts:
                self._restart(index, publisher)

    def _restart(self, index: int, publisher: WeightPublisher | None) -> None:
        process, options = self._group.processes[index], self._group.options
        # a new process
        self._restarts[index] += 1
        began = time.monotonic()
        _LOG.warning("sglang server %d ended; restart %d of %d", index, self._restarts[index], options.max_restarts)
        process.stop()
        process.start()
        failure = process.await_ready(time.monotonic() + options.start_timeout_s, self._group.closing)
        if failure:
            _LOG.warning("sglang server %d %s; see %s", index, failure, process.log_file)
            self._group.to_replace.add(index)
            return
        self._group.to_replace.discard(index)  # only here: who gave up on it meanwhile meant the old process
        # the current weights
        try:
            if publisher is not None:
                publisher.restore(index)
        except RuntimeError as error:
            _LOG.warning("sglang server %d did not take the current weights: %s", index, error)
            return
        _LOG.warning("sglang server %d is back after %.1f s", index, time.monotonic() - began)

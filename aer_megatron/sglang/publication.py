"""Publishes policy weights to servers.

    withdraw all -> transfer -> checksum of every tensor -> version label -> serve

Rank 0 leads; the others take part in gathering the weights and are told the outcome. Servers that did not take the
weights are out of service. Where no server answers at all, the leader waits for one to come back. FP8 is made here, of
whole tensors.

This file does NOT know how bytes travel: ``transports/`` does.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor

from aer_megatron.convert.fp8_weights import iter_fp8_weights
from aer_megatron.parallel.agreement import exchange_json, on_first_rank
from aer_megatron.parallel.exchange import barrier
from aer_megatron.parallel.platform import Platform
from aer_megatron.sglang.checksum_queue import ChecksumQueue
from aer_megatron.sglang.served_weights import ServedChecksums
from aer_megatron.sglang.transports import BaseTransport
from aer_megatron.sglang.weight_servers import Published, Untransferred, WeightServers

_RECOVERY_POLL_S = 0.5
_IDLE_S = 30.0  # how long a server may take to finish what it was asked


class WeightPublisher:
    """Publishes to ``servers`` through ``transport``; every rank has one, and all make the same calls.

    ``recovery_s`` is how long a publication waits when no server answers.
    """

    def __init__(
        self, servers: WeightServers, transport: BaseTransport, platform: Platform, *, recovery_s: float
    ) -> None:
        self._servers = servers
        self._fleet = servers.fleet
        self._transport = transport
        self._platform = platform
        self._leads = platform.rank == 0
        self._recovery_s = recovery_s
        self._lock = threading.Lock()  # between publishing and restoring a restarted server
        self._published: Published | None = None
        self._released: set[int] = set()  # servers without their memory

    def publish(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Puts the tensors into service as policy ``version``; every rank calls it with the same stream.

        Raises:
            RuntimeError: on every rank, if no server took them, or the weights could not be written or gathered.
        """
        with self._lock:
            self._fleet.withdraw(f"policy version {version} is being transferred")
            self._agree_on_restarts()
            if not self._leads:
                for _ in named_tensors:
                    pass
            refused = on_first_rank(
                lambda: self._lead(iter(named_tensors), version),
                rank=self._platform.rank,
                device=self._platform.device,
            )
            self._fleet.serve(version, {int(index): reason for index, reason in refused.items()})

    def restore(self, index: int) -> None:
        """Gives the last published weights to a server in a new process; RuntimeError where it does not take them."""
        self._fleet.allow_transfer(index)
        with self._lock:
            if self._published is None:
                return  # the first publication is still to come
            try:
                if not self._servers.carries(index, self._published):  # a publication may have reached it first
                    self._released.discard(index)
                    self._resend(index, self._published)
            except Untransferred as error:
                raise RuntimeError(f"server {index}: {error}") from None

    def suspend(self) -> None:
        """Has the servers give their memory back until the next publication; every rank calls it, and none generates.

        A server that cannot is out of service and replaced.
        """
        with self._lock:
            self._fleet.withdraw("its memory is released for training")
            barrier()  # no rank has a request under way any more
            if self._leads:
                may = [index for index in self._servers.indices if self._fleet.may_transfer(index)]
                for index in self._servers.in_parallel(self._release, may):
                    self._servers.replace(index)

    def _agree_on_restarts(self) -> None:
        """Has the leader restart the servers that any rank caught with garbage."""
        mine = [index for index in self._servers.indices if not self._fleet.may_transfer(index)]
        reports = exchange_json(mine, device=self._platform.device)
        for index in {index for report in reports for index in report}:
            if self._leads:
                self._fleet.require_restart(index)
                self._servers.replace(index)
            else:
                self._fleet.allow_transfer(index)  # it is out of service until the leader has verified it

    def _lead(self, named_tensors: Iterator[tuple[str, Tensor]], version: int) -> dict[int, str]:
        """Returns the reasons of the servers that did not take the weights; raises RuntimeError where none did."""
        published = Published(version)
        servers, num_servers = self._servers, len(self._servers.indices)
        try:
            # find out which servers can take weights; wait while none can
            refused = self._until_any(self._prepare)
            if len(refused) == num_servers:
                raise RuntimeError(f"no server can take weights: {refused}")
            refused |= self._send(named_tensors, published, [i for i in servers.indices if i not in refused])
            # all were lost meanwhile: send again to those that come back
            if len(refused) == num_servers and servers.silent:
                refused = self._until_any(lambda index: self._resend(index, published))
            if len(refused) == num_servers:
                raise RuntimeError(f"no server took the weights: {refused}")
        except (OSError, ValueError, RuntimeError) as error:
            raise RuntimeError(f"weight transfer of policy version {version}: {error}") from error
        finally:
            for _ in named_tensors:  # the other ranks gather until the stream ends
                pass
        self._published = published
        return refused

    def _send(
        self, named_tensors: Iterator[tuple[str, Tensor]], published: Published, indices: list[int]
    ) -> dict[int, str]:
        """Sends the stream to servers and verifies them; returns the reasons of those that did not take it."""
        servers = self._servers
        sizes = sorted({servers.tp_size[index] for index in indices})
        checksums = {size: ServedChecksums(servers.arch, tp_size=size) for size in sizes}

        def add(name: str, tensor: Tensor) -> None:
            for of_size in checksums.values():
                of_size.add(name, tensor)

        def finish() -> dict[int, list[dict[str, str]]]:
            queue.finish()
            return {size: of_size.result() for size, of_size in checksums.items()}

        sent = iter_fp8_weights(named_tensors) if servers.fp8 else named_tensors
        with ChecksumQueue(add, max_bytes=self._platform.spare_weight_bytes) as queue, ThreadPoolExecutor(1) as pool:
            refused = self._transport.send(queue.stream(sent), published.version, indices)
            # our checksums and the servers' are computed at the same time
            published.expected = pool.submit(finish)
            taken = [index for index in indices if index not in refused]
            refused |= servers.in_parallel(lambda index: servers.verify(index, published), taken)
            published.expected.result()
        return refused

    def _resend(self, index: int, published: Published) -> None:
        """Gives weights that were published to a server that came back; raises Untransferred."""
        self._transport.forget(index)  # its process is another one
        if not self._transport.keeps_weights:
            raise Untransferred("it is given weights with the next publication: this transport keeps none")
        self._servers.identify(index, self._published)
        size = self._servers.tp_size[index]
        if size not in published.expected.result():
            raise Untransferred(f"it came back with tp_size {size}, another one than before")
        self._transport.load(index, published.version)
        self._servers.verify(index, published)

    def _until_any(self, action: Callable[[int], None]) -> dict[int, str]:
        """Returns the reasons of the servers for which ``action`` failed; repeats while none answers at all."""
        deadline = time.monotonic() + self._recovery_s
        level = logging.WARNING
        while True:
            unfit = {
                index: "it answered garbage and was not restarted"
                for index in self._servers.indices
                if not self._fleet.may_transfer(index)
            }
            fit = [index for index in self._servers.indices if index not in unfit]
            refused = unfit | self._servers.in_parallel(action, fit, level=level)
            awaited = self._servers.silent or unfit
            if len(refused) < len(self._servers.indices) or not awaited or time.monotonic() > deadline:
                return refused
            level = logging.DEBUG
            time.sleep(_RECOVERY_POLL_S)

    def _prepare(self, index: int) -> None:
        """Gives a server its memory back, if it is still the process that released it, and identifies it."""
        if index in self._released:
            if self._servers.carries(index, self._published):
                self._memory(index, "/resume_memory_occupation")
            self._released.discard(index)
        self._servers.identify(index, self._published)

    def _release(self, index: int) -> None:
        # a server that is not idle would end itself
        idle = self._fleet.control(index, f"/flush_cache?timeout={_IDLE_S:g}", {}, timeout_s=2 * _IDLE_S)
        if idle.status != 200:
            raise Untransferred(f"it is not idle: {idle.text}")
        self._memory(index, "/release_memory_occupation")
        self._released.add(index)

    def _memory(self, index: int, path: str) -> None:
        reply = self._servers.control(index, path, {})
        if reply.status != 200:
            raise Untransferred(f"{path} answers {reply.status}: {reply.text}")

"""Weights over a process group: the trainer broadcasts flattened buckets, each server loads them as they come.

Every server has a group of its own (rank 0 = the trainer, then its tensor-parallel ranks), so one that fails or hangs
costs only itself. The HTTP reply is watched while a group is made and while a broadcast is under way: a server that
refuses would otherwise leave the trainer waiting for a receiver that never comes.
"""

from __future__ import annotations

import functools
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import Backend, PrefixStore

from aer_megatron.sglang.buckets import Bucket, buckets
from aer_megatron.sglang.fleet import ServerFleet
from aer_megatron.sglang.sessions import SessionSync
from aer_megatron.sglang.weight_sync import Published, SyncContext, Untransferred

# what servers use too: the names under which the members find one another depend on it
_new_group: Any = distributed_c10d._new_process_group_helper
_POLL_S = 0.001
_JOIN_POLL_S = 0.01
_CONNECTED_WITHIN_S = 60.0  # from the request to enter a group
_JOINED_WITHIN_S = 30.0  # after a server's word that it is in the group


@dataclass(frozen=True, slots=True)
class _Link:
    """The group that the trainer shares with one server."""

    name: str
    group: Any  # torch's ProcessGroup
    stores: Any  # held for as long as the group


class DistributedSync(SessionSync):
    """Publishes by broadcast.

    Args:
        fleet, context: see ``sync.servers``.
        backend: "gloo", or "nccl" where trainer and servers have GPUs.
        address: of this process, as the servers reach it.
        bucket_bytes: of one broadcast (a larger tensor travels alone).
    """

    def __init__(
        self, fleet: ServerFleet, context: SyncContext, *, backend: str, address: str, bucket_bytes: int
    ) -> None:
        super().__init__(fleet, context)
        self._backend = backend
        self._address = address
        self._bucket_bytes = bucket_bytes
        self._links: dict[int, _Link] = {}
        self._calls = ThreadPoolExecutor(2 * len(fleet.servers), thread_name_prefix="sglang-transfer")

    def close(self) -> None:
        """Leaves all groups."""
        for index in list(self._links):
            self._leave(index)
        self._calls.shutdown(wait=False)

    def _send(
        self, named_tensors: Iterator[tuple[str, Tensor]], version: int, indices: Sequence[int]
    ) -> dict[int, str]:
        refused = self._in_parallel(self._open, indices)
        alive = [index for index in indices if index not in refused]
        made = buckets(named_tensors, self._bucket_bytes)
        refused |= self._send_each(made, functools.partial(self._broadcast, version), alive)
        alive = [index for index in indices if index not in refused]
        refused |= self._in_parallel(self._end, alive)
        for index in refused:
            self._tidy(index)
        return refused

    def _resend(self, index: int, published: Published) -> None:
        self._forget(index)  # its process is another one
        super()._resend(index, published)

    def _open(self, index: int) -> None:
        """Links a server that is not linked yet and begins a session."""
        if index not in self._links:
            self._link(index)
        self._begin(index)

    def _link(self, index: int) -> None:
        name = f"aer-{uuid.uuid4().hex[:12]}"
        size = 1 + self._tp_size[index]
        timeout = timedelta(seconds=self._context.timeout_s)
        # a store of its own: torchrun's would be taken for the launcher's. Its host and this process's connection to it
        # are two, so that who waits there comes back when the host ends
        host = _store_host(self._address, size, timeout)
        store = dist.TCPStore(self._address, host.port, size, timeout=timeout, wait_for_workers=False)
        body = {
            "master_address": self._address,
            "master_port": host.port,
            "rank_offset": 1,
            "world_size": size,
            "group_name": name,
            "backend": self._backend,
        }
        call = self._calls.submit(self._post, index, "/init_weights_update_group", body)
        deadline = time.monotonic() + min(_CONNECTED_WITHIN_S, self._context.timeout_s)
        while not call.done() and not store.num_keys():  # it says no, or is there: until then nothing waits for it
            if time.monotonic() > deadline:
                raise Untransferred(
                    f"it did not connect to {self._address} port {host.port}; sglang.trainer_address must be how "
                    "servers reach rank 0"
                )
            time.sleep(_JOIN_POLL_S)
        if call.done():
            call.result()
        making = self._calls.submit(
            _new_group, size, 0, [], Backend(self._backend), PrefixStore(name, store), group_name=name, timeout=timeout
        )
        wait([call, making], return_when=FIRST_COMPLETED)
        if call.done():
            wait([making], timeout=0.0 if call.exception() else _JOINED_WITHIN_S)
        if not making.done():
            del host  # nobody will join: who waits at the store is told
        try:
            group, _ = making.result()
        except (RuntimeError, ValueError) as error:
            if call.done():
                call.result()  # the reason, where the server gave one
            raise Untransferred(f"no process group with it: {error}") from None
        distributed_c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(size)}  # torch asks at its end
        self._links[index] = _Link(name, group, (host, store))
        call.result()

    def _broadcast(self, version: int, bucket: Bucket, index: int) -> None:
        link = self._links[index]
        body = {
            "names": bucket.names,
            "dtypes": bucket.dtype_names,
            "shapes": bucket.shapes,
            "group_name": link.name,
            "load_format": "flattened_bucket",
            "flush_cache": True,
            "weight_version": self._context.labels.unverified(version),
        }
        call = self._calls.submit(self._post, index, "/update_weights_from_distributed", body)
        options = dist.BroadcastOptions()
        options.rootRank = 0
        try:
            work = link.group.broadcast([bucket.flat], options)
            self._await(work, call)
            call.result()
        except RuntimeError as error:
            raise Untransferred(f"the broadcast to it failed: {error}") from None

    def _await(self, work: Any, call: Future[Any]) -> None:
        """Returns when the broadcast is done; raises what the call raised, or Untransferred after ``timeout_s``."""
        deadline = time.monotonic() + self._context.timeout_s
        while not work.is_completed():
            if call.done():
                call.result()  # raises where the server refused: nobody will receive
            if time.monotonic() > deadline:
                raise Untransferred(f"it did not receive a bucket within {self._context.timeout_s:g} s")
            time.sleep(_POLL_S)
        work.wait()

    def _tidy(self, index: int) -> None:
        """Leaves a server that failed without an open session and without a group, as far as it answers."""
        self._leave(index)
        self._leave_no_session(index)

    def _leave(self, index: int) -> None:
        if index in self._links:
            name = self._links[index].name
            self._farewell(index, "/destroy_weights_update_group", {"group_name": name})
            self._forget(index)

    def _forget(self, index: int) -> None:
        link = self._links.pop(index, None)
        if link is not None:
            link.group.abort()  # a broadcast that nobody receives ends here, not at its timeout
            dist.destroy_process_group(link.group)


def _store_host(address: str, size: int, timeout: timedelta) -> Any:
    """Returns a store that listens on ``address`` alone, or, where this machine does not have it, on all of its own."""
    family, _, _, _, place = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.bind(place)
    except OSError:  # the servers reach this machine by an address of a gateway
        listener.bind(("", 0))
    listener.listen()
    port = listener.getsockname()[1]
    return dist.TCPStore(
        address, port, size, is_master=True, timeout=timeout, wait_for_workers=False, master_listen_fd=listener.detach()
    )

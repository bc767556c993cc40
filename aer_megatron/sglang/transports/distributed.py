"""Weights over a process group: the trainer broadcasts flattened buckets, each server loads them as they come.

Every server has a group of its own (rank 0 = the trainer, then its tensor-parallel ranks), so one that fails or hangs
costs only itself. The HTTP reply is watched while a group is made and while a broadcast is under way: a server that
refuses would otherwise leave the trainer waiting for a receiver that never comes.
"""

from __future__ import annotations

import socket
import time
import uuid
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import Backend, PrefixStore

from aer_megatron.sglang.buckets import Bucket
from aer_megatron.sglang.sessions import SessionTransport
from aer_megatron.sglang.transports import TransportOptions
from aer_megatron.sglang.weight_servers import Untransferred, WeightServers

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


class Transport(SessionTransport):
    """Publishes by broadcast."""

    def __init__(self, servers: WeightServers, options: TransportOptions) -> None:
        super().__init__(servers, options)
        self._links: dict[int, _Link] = {}
        self._calls = ThreadPoolExecutor(2 * len(servers.indices), thread_name_prefix="sglang-transfer")

    def forget(self, index: int) -> None:
        """Leaves the group of a server without a word to it."""
        link = self._links.pop(index, None)
        if link is not None:
            link.group.abort()  # a broadcast that nobody receives ends here, not at its timeout
            dist.destroy_process_group(link.group)

    def close(self) -> None:
        """Leaves all groups."""
        for index in list(self._links):
            self._leave(index)
        self._calls.shutdown(wait=False)

    def _begin(self, index: int) -> None:
        """Links a server that is not linked yet and begins a session."""
        if index not in self._links:
            self._link(index)
        super()._begin(index)

    def _link(self, index: int) -> None:
        """Makes the group with a server; raises Untransferred where it does not join."""
        name, address = f"aer-{uuid.uuid4().hex[:12]}", self._options.address
        size = 1 + self._servers.tp_size[index]
        timeout = timedelta(seconds=self._servers.timeout_s)
        # a store of its own: torchrun's would be taken for the launcher's. Its host and this process's connection to it
        # are two, so that who waits there comes back when the host ends
        host = _store_host(address, size, timeout)
        store = dist.TCPStore(address, host.port, size, timeout=timeout, wait_for_workers=False)
        body = {
            "master_address": address,
            "master_port": host.port,
            "rank_offset": 1,
            "world_size": size,
            "group_name": name,
            "backend": self._options.backend,
        }
        # the server connects, or says no: until then nothing here waits for it
        call = self._calls.submit(self._servers.post, index, "/init_weights_update_group", body)
        deadline = time.monotonic() + min(_CONNECTED_WITHIN_S, self._servers.timeout_s)
        while not call.done() and not store.num_keys():
            if time.monotonic() > deadline:
                raise Untransferred(
                    f"it did not connect to {address} port {host.port}; sglang.trainer_address must be how servers "
                    "reach rank 0"
                )
            time.sleep(_JOIN_POLL_S)
        if call.done():
            call.result()
        # both make the group; the server's reply is watched meanwhile
        stores, backend = PrefixStore(name, store), Backend(self._options.backend)
        making = self._calls.submit(_new_group, size, 0, [], backend, stores, group_name=name, timeout=timeout)
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

    def _load(self, index: int, bucket: Bucket, prepared: Any, fields: dict[str, Any]) -> None:
        link = self._links[index]
        body = {
            "names": bucket.names,
            "dtypes": bucket.dtype_names,
            "shapes": bucket.shapes,
            "group_name": link.name,
            **fields,
        }
        call = self._calls.submit(self._servers.post, index, "/update_weights_from_distributed", body)
        options = dist.BroadcastOptions()
        options.rootRank = 0
        try:
            work = link.group.broadcast([bucket.flat], options)
            self._wait_for(work, call)
            call.result()
        except RuntimeError as error:
            raise Untransferred(f"the broadcast to it failed: {error}") from None

    def _wait_for(self, work: Any, call: Future[Any]) -> None:
        """Waits for a broadcast; raises what the call raised, or Untransferred after ``timeout_s``."""
        deadline = time.monotonic() + self._servers.timeout_s
        while not work.is_completed():
            if call.done():
                call.result()  # raises where the server refused: nobody will receive
            if time.monotonic() > deadline:
                raise Untransferred(f"it did not receive a bucket within {self._servers.timeout_s:g} s")
            time.sleep(_POLL_S)
        work.wait()

    def _abandon(self, index: int) -> None:
        """Leaves a server that failed without a group and without an open session, as far as it answers."""
        self._leave(index)
        super()._abandon(index)

    def _leave(self, index: int) -> None:
        if index in self._links:
            body = {"group_name": self._links[index].name}
            self._servers.try_post(index, "/destroy_weights_update_group", body)
            self.forget(index)


def _store_host(address: str, size: int, timeout: timedelta) -> Any:
    """Returns a store that listens on ``address`` alone, or, where this machine does not have it, on all of its own."""
    family, _, _, _, wanted = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.bind(wanted)
    except OSError:  # the servers reach this machine by an address of a gateway
        listener.bind(("", 0))
    listener.listen()
    port = listener.getsockname()[1]
    return dist.TCPStore(
        address, port, size, is_master=True, timeout=timeout, wait_for_workers=False, master_listen_fd=listener.detach()
    )

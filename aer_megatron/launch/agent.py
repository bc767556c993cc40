"""torchrun's agent with processes of our own: rendezvous, rank numbers and the exit barrier are torch's.

What differs from ``torch.distributed.run``: the store listens on one address, not on all, and nothing in it is pickled;
signals are handed on to the ranks, and they are waited for (rank_processes.py). A lost rank ends the launch: it is not
started again.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, Store, TCPStore
from torch.distributed.elastic.agent.server.api import (
    RunResult,
    SimpleElasticAgent,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from aer_megatron.console.failures import LAUNCH_ROLE
from aer_megatron.launch.rank_processes import RankProcesses

_POLL_S = 0.1
_RETRY_S = 0.3
_EXIT_BARRIER_S = 300.0


@dataclass(frozen=True, slots=True)
class Nodes:
    """The machines of a launch. Example: ``Nodes(2, 0, "10.0.0.1", 29400, run_id="aer", join_timeout_s=600.0)``."""

    count: int
    rank: int  # of this machine; the one of rank 0 holds the store
    master_addr: str
    master_port: int  # 0: any, for one machine
    run_id: str
    join_timeout_s: float


def open_listener(nodes: Nodes) -> socket.socket:
    """Returns a socket that listens on the address of ``nodes.master_addr``, and on no other.

    Raises:
        ValueError: the address is not known, or not this machine's.
        RuntimeError: the port is taken.
    """
    place = f"{nodes.master_addr} port {nodes.master_port}"
    try:
        family, _, _, _, address = socket.getaddrinfo(nodes.master_addr, nodes.master_port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ValueError(f"--master-addr={nodes.master_addr} has no address ({error}); give a node's name") from None
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the same command again, right after its end
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise ValueError(
                f"--master-addr={nodes.master_addr} is no address of this machine, which has --node-rank=0; "
                "give node rank 0 to the machine that --master-addr names"
            ) from None
        raise RuntimeError(f"cannot listen on {place} ({error.strerror}); give another --master-port") from None
    return listener


class StaticRendezvous(RendezvousHandler):
    """Nodes that know their number and one address; torch's handler of that name listens on all addresses."""

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes

    def next_rendezvous(self) -> RendezvousInfo:
        """Waits until every node has joined, and returns their store, this node's number and how many there are.

        Raises:
            ValueError: node rank 0 is not the machine of the address.
            RuntimeError: a node does not come in time.
        """
        nodes = self._nodes
        store, port = self._host() if nodes.rank == 0 else self._join()
        return RendezvousInfo(
            PrefixStore(nodes.run_id, store), nodes.rank, nodes.count, RendezvousStoreInfo(nodes.master_addr, port)
        )

    def _host(self) -> tuple[Store, int]:
        nodes = self._nodes
        listener = open_listener(nodes)
        port = int(listener.getsockname()[1])
        place = (nodes.master_addr, port, nodes.count, True, timedelta(seconds=nodes.join_timeout_s))
        try:
            store = TCPStore(*place, multi_tenant=True, master_listen_fd=listener.detach())
        except RuntimeError as error:
            raise RuntimeError(
                f"not all of {nodes.count} nodes joined {nodes.master_addr} port {port} within "
                f"{nodes.join_timeout_s:g} s ({_first_line(error)}); start the same command on each of them"
            ) from None
        return store, port

    def _join(self) -> tuple[Store, int]:
        nodes = self._nodes
        place = f"{nodes.master_addr} port {nodes.master_port}"
        until = time.monotonic() + nodes.join_timeout_s
        while True:  # torch prints a stack for every try
            try:
                socket.create_connection((nodes.master_addr, nodes.master_port), timeout=10.0).close()
                break
            except OSError as error:
                if time.monotonic() > until:
                    raise RuntimeError(
                        f"no launcher at {place} after {nodes.join_timeout_s:g} s ({error}); start the same command "
                        "with --node-rank=0 there, and open the port to this machine"
                    ) from None
                time.sleep(_RETRY_S)
        timeout = timedelta(seconds=max(1.0, until - time.monotonic()))
        try:
            store = TCPStore(nodes.master_addr, nodes.master_port, nodes.count, False, timeout)
        except RuntimeError as error:
            raise RuntimeError(f"the launcher at {place} went away ({_first_line(error)})") from None
        return store, nodes.master_port

    @property
    def use_agent_store(self) -> bool:
        return True

    def get_backend(self) -> str:
        return "static"

    def get_run_id(self) -> str:
        return self._nodes.run_id

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None: ...

    def num_nodes_waiting(self) -> int:
        return 0

    def shutdown(self) -> bool:
        return True


class LaunchAgent(SimpleElasticAgent):
    """Runs ``processes`` as the workers of torchrun's agent.

    Args:
        environment: of every rank, beside the variables that tell it its place.
    """

    def __init__(self, nodes: Nodes, ranks_here: int, processes: RankProcesses, environment: Mapping[str, str]) -> None:
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # a lost peer's trace is no news
        spec = WorkerSpec(
            role=LAUNCH_ROLE,
            local_world_size=ranks_here,
            rdzv_handler=StaticRendezvous(nodes),
            entrypoint="aer_megatron.launch.rank_main",
            max_restarts=0,
            monitor_interval=_POLL_S,
        )
        super().__init__(spec, exit_barrier_timeout=_EXIT_BARRIER_S)
        self._processes = processes
        self._environment = environment
        self._signals = contextlib.ExitStack()

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        shared = {
            **self._environment,
            "GROUP_RANK": str(worker_group.group_rank),
            "GROUP_WORLD_SIZE": str(worker_group.group_world_size),
            "ROLE_NAME": LAUNCH_ROLE,
            "LOCAL_WORLD_SIZE": str(worker_group.spec.local_world_size),
            "MASTER_ADDR": str(worker_group.master_addr),
            "MASTER_PORT": str(worker_group.master_port),
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_MAX_RESTARTS": "0",
            "TORCHELASTIC_RUN_ID": worker_group.spec.rdzv_handler.get_run_id(),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        places = {
            worker.global_rank: {
                "RANK": str(worker.global_rank),
                "LOCAL_RANK": str(worker.local_rank),
                "ROLE_RANK": str(worker.role_rank),
                "WORLD_SIZE": str(worker.world_size),
                "ROLE_WORLD_SIZE": str(worker.role_world_size),
            }
            for worker in worker_group.workers
        }
        self._signals.enter_context(self._processes.receiving_signals())
        pids = self._processes.start({number: {**shared, **place} for number, place in places.items()})
        return {worker.local_rank: pids[worker.global_rank] for worker in worker_group.workers}

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        if not self._processes.all_ended():
            return RunResult(state=WorkerState.HEALTHY)
        self._signals.close()  # from here on they end the launcher, also while it waits for other nodes
        if self._processes.failure() is not None:
            return RunResult(state=WorkerState.FAILED)
        return RunResult(
            state=WorkerState.SUCCEEDED, return_values={worker.global_rank: 0 for worker in worker_group.workers}
        )

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        self._shutdown()

    def _shutdown(self, death_sig: Any = None, timeout: int = 0) -> None:
        self._processes.kill()
        self._signals.close()


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]

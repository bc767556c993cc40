"""Machines that look for one another: one address is open, and what is wrong is said with its remedy."""

from __future__ import annotations

import socket
import threading

import pytest

from aer_megatron.launch.agent import Nodes, StaticRendezvous, open_listener


def nodes(rank: int, address: str, port: int, *, count: int = 2, join_timeout_s: float = 20.0) -> Nodes:
    return Nodes(count, rank, address, port, run_id="test", join_timeout_s=join_timeout_s)


def free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def test_two_machines_meet() -> None:
    port = free_port("127.0.0.1")
    hosted: list[bytes] = []

    def host() -> None:
        store = StaticRendezvous(nodes(0, "127.0.0.1", port)).next_rendezvous().store
        store.set("from 0", "hello")
        hosted.append(store.get("from 1"))

    thread = threading.Thread(target=host)
    thread.start()
    joined = StaticRendezvous(nodes(1, "127.0.0.1", port)).next_rendezvous()
    assert (joined.rank, joined.world_size) == (1, 2)
    assert joined.store.get("from 0") == b"hello"
    joined.store.set("from 1", "hello back")
    thread.join(30)
    assert hosted == [b"hello back"]


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "localhost"])
def test_the_listener_is_bound_to_the_address(address: str) -> None:
    try:
        listener = open_listener(nodes(0, address, 0))
    except ValueError:
        pytest.skip(f"this machine has no {address}")
    with listener:
        assert listener.getsockname()[0] in ("127.0.0.1", "::1")


def test_an_address_of_another_machine() -> None:
    with pytest.raises(ValueError, match=r"192\.0\.2\.1 is no address of this machine.*node rank 0"):
        StaticRendezvous(nodes(0, "192.0.2.1", 0)).next_rendezvous()


def test_a_name_without_an_address() -> None:
    with pytest.raises(ValueError, match=r"--master-addr=no\.such\.host\.invalid has no address"):
        StaticRendezvous(nodes(0, "no.such.host.invalid", 0)).next_rendezvous()


def test_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RuntimeError, match=f"127.0.0.1 port {port} .*another --master-port"):
            StaticRendezvous(nodes(0, "127.0.0.1", port)).next_rendezvous()


def test_nobody_there() -> None:
    port = free_port("127.0.0.1")
    with pytest.raises(RuntimeError, match=f"no launcher at 127.0.0.1 port {port} after 0.1 s .*--node-rank=0"):
        StaticRendezvous(nodes(1, "127.0.0.1", port, join_timeout_s=0.1)).next_rendezvous()


def test_a_machine_that_does_not_come() -> None:
    with pytest.raises(RuntimeError, match="not all of 2 nodes joined"):
        StaticRendezvous(nodes(0, "127.0.0.1", 0, join_timeout_s=1.0)).next_rendezvous()

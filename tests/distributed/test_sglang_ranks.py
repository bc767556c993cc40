"""Servers shared by training ranks: one leads the transfer, all learn its outcome, errors reach everyone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from aer_megatron.convert.hf_config import architecture_from_hf_config
from aer_megatron.parallel.agreement import on_first_rank
from aer_megatron.parallel.platform import Platform
from aer_megatron.sglang.fleet import ServerFleet
from aer_megatron.sglang.http_loop import ClientOptions
from aer_megatron.sglang.labels import WeightLabels
from aer_megatron.sglang.publication import WeightPublisher
from aer_megatron.sglang.weight_servers import WeightServers
from tests.support.sglang_double import SGLangDouble
from tests.support.sglang_fixtures import Replacements, made_transport, weights
from tests.support.spawn import run_distributed

CPU = torch.device("cpu")
RUN = "aer-0123456789abcdef"


def publish(rank: int, world_size: int, urls: list[str], folder: str, distrusts: int | None) -> dict[str, Any]:
    """Returns what a rank sees after one publication; ``distrusts`` is a server that rank 1 caught with garbage."""
    hf_config = json.loads((Path(folder) / "config.json").read_text())
    group = Replacements(Path(folder))
    options = ClientOptions(max_concurrency=4, connect_timeout_s=2.0, control_timeout_s=10.0, api_key=None)
    with ServerFleet(urls, options) as fleet:
        arch = architecture_from_hf_config(hf_config)
        servers = WeightServers(fleet, arch, WeightLabels(RUN), timeout_s=10.0, fp8=False, group=group)
        transport = made_transport("disk", servers, Path(folder).parent / "shared", hf_config)
        sync = WeightPublisher(servers, transport, Platform("cpu", "gloo", rank, world_size, rank), recovery_s=0.5)
        if rank == 1 and distrusts is not None:
            fleet.servers[distrusts].comeback = "restart"
        read = 0
        error = ""

        def stream() -> Any:
            nonlocal read
            for item in weights(1).items():
                read += 1
                yield item

        try:
            sync.publish(stream(), 4)
        except RuntimeError as raised:
            error = str(raised)
        seen = {"version": fleet.policy_version, "serves": fleet.in_service(), "read": read, "error": error}
        if distrusts is not None:
            if rank == 0:
                fleet.allow_transfer(distrusts)  # as the supervisor does once it has restarted the server
            sync.publish(stream(), 5)
        transport.close()
        return seen | {"replaced": group.replaced, "serves_later": fleet.in_service()}


def test_all_ranks_learn_who_serves(folder: Path) -> None:
    with SGLangDouble(folder) as first, SGLangDouble(folder) as second:
        second.update_fault = "drops_a_tensor"
        seen = run_distributed(publish, 2, [first.url, second.url], str(folder), None)
    assert [rank["serves"] for rank in seen] == [[0], [0]]
    assert [rank["version"] for rank in seen] == [4, 4]
    assert [rank["read"] for rank in seen] == [len(weights(1))] * 2


def test_what_one_rank_distrusts_is_replaced_by_the_leader(folder: Path) -> None:
    with SGLangDouble(folder) as first, SGLangDouble(folder) as second:
        seen = run_distributed(publish, 2, [first.url, second.url], str(folder), 1)
    assert [rank["serves"] for rank in seen] == [[0], [0]]
    assert [rank["serves_later"] for rank in seen] == [[0, 1], [0, 1]]
    assert [rank["replaced"] for rank in seen] == [[1], []]  # once, not at every publication


def test_a_failed_transfer_is_an_error_on_every_rank(folder: Path) -> None:
    with SGLangDouble(folder) as server:
        server.update_fault = "500"
        seen = run_distributed(publish, 2, [server.url], str(folder), None)
    assert all("no server took the weights" in rank["error"] for rank in seen)
    assert [rank["serves"] for rank in seen] == [[], []]


def agree(rank: int, world_size: int) -> tuple[Any, str]:
    value = on_first_rank(lambda: [f"url of rank {rank}"], rank=rank, device=CPU)

    def fail() -> None:
        raise OSError("no such interpreter")

    try:
        on_first_rank(fail, rank=rank, device=CPU)
    except RuntimeError as error:
        return value, str(error)
    return value, ""


def test_the_first_rank_s_value_or_error_is_everyone_s() -> None:
    assert run_distributed(agree, 2) == [(["url of rank 0"], "no such interpreter")] * 2

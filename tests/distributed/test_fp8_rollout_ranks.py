"""FP8 for servers is made of whole tensors: a policy on two tensor-parallel ranks gives what one rank gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aer_megatron.convert.folders import hf_to_fp8
from aer_megatron.convert.fp8_weights import iter_fp8_weights
from aer_megatron.convert.hf_config import architecture_from_hf_config
from aer_megatron.convert.hf_folder import HFFolder
from aer_megatron.parallel.platform import Platform
from aer_megatron.sglang.fleet import ServerFleet
from aer_megatron.sglang.http_loop import ClientOptions
from aer_megatron.sglang.labels import WeightLabels
from aer_megatron.sglang.publication import WeightPublisher
from aer_megatron.sglang.weight_servers import WeightServers
from tests.support.fp8_models import fp8_tensors, save_fp8_model
from tests.support.sglang_double import SGLangDouble
from tests.support.sglang_fixtures import made_transport
from tests.support.spawn import run_distributed

RUN = "aer-0123456789abcdef"


def publish(rank: int, world_size: int, folder: str, urls: list[str]) -> dict[str, Any]:
    """Returns the FP8 stream that this rank's shards give; where there are servers they are published to them too."""
    from aer_megatron.actor.weights import iter_hf_weights, load_hf_weights
    from aer_megatron.conversion.logits import build_gpt
    from aer_megatron.parallel.platform import install_platform
    from aer_megatron.parallel.topology import initialize_topology

    install_platform()
    topology = initialize_topology(tp=world_size, pp=1, seed=0)
    opened = HFFolder(Path(folder))
    arch = architecture_from_hf_config(opened.config)
    model = build_gpt(arch, topology)
    load_hf_weights(model, arch, topology, opened.get)
    gate_up = dict(model.named_parameters())["decoder.layers.0.mlp.linear_fc1.weight"]
    assert gate_up.shape[0] == 768 // world_size  # with two ranks 192 of gate, 192 of up: no whole blocks

    def stream() -> Any:
        return iter_hf_weights(model, arch, topology, bucket_bytes=10**6)

    options = ClientOptions(max_concurrency=4, connect_timeout_s=2.0, control_timeout_s=10.0, api_key=None)
    if urls:
        with ServerFleet(urls, options) as fleet:
            servers = WeightServers(fleet, arch, WeightLabels(RUN), timeout_s=20.0, fp8=True)
            table = json.loads((Path(folder) / "config.json").read_text())
            transport = made_transport("disk", servers, Path(folder).parent / "shared", table, bucket_bytes=10**6)
            sync = WeightPublisher(servers, transport, Platform("cpu", "gloo", rank, world_size, rank), recovery_s=0.5)
            sync.publish(stream(), 4)
            assert fleet.in_service() == [0]
            transport.close()
    return {name: (str(tensor.dtype), bits(tensor)) for name, tensor in iter_fp8_weights(stream())}


def bits(tensor: torch.Tensor) -> Any:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().copy()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_fp8_model(tmp_path_factory.mktemp("fp8_ranks") / "model")


def test_two_ranks_give_the_blocks_of_the_whole_tensors(folder: Path) -> None:
    opened = HFFolder(folder)
    expected = fp8_tensors({name: opened.get(name) for name in opened.names()})
    start = hf_to_fp8(
        save_fp8_model(folder.parent / "other", seed=1),
        folder.parent / "start",
        dtype=torch.float32,
        max_shard_bytes=10**9,
    )
    with SGLangDouble(start) as server:
        seen = run_distributed(publish, 2, str(folder), [server.url])
        assert server.weight_version == f"{RUN}/4"
        for name in ("model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight_scale_inv"):
            assert np.array_equal(server.weights[name].view(np.uint8).ravel(), bits(expected[name])), name
    (alone,) = run_distributed(publish, 1, str(folder), [])
    for rank in (alone, *seen):
        assert list(rank) == list(alone) and set(rank) == set(expected)
        for name, (dtype, raw) in rank.items():
            assert dtype == str(expected[name].dtype)
            assert np.array_equal(raw, bits(expected[name])), name

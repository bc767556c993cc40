"""Tiny model folders, transports and engines over servers, for the tests of SGLang rollouts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from aer_megatron.convert.hf_config import architecture_from_hf_config
from aer_megatron.parallel.platform import Platform
from aer_megatron.rollout.engine import GenerateRequest, SamplingOptions
from aer_megatron.sglang.calls import RequestLimits
from aer_megatron.sglang.engine import SGLangEngine
from aer_megatron.sglang.fleet import ServerFleet
from aer_megatron.sglang.http_loop import ClientOptions
from aer_megatron.sglang.labels import WeightLabels, new_run_id
from aer_megatron.sglang.publication import WeightPublisher
from aer_megatron.sglang.server import LaunchOptions, ServerGroup
from aer_megatron.sglang.transports import BaseTransport, TransportOptions, make_transport
from aer_megatron.sglang.weight_servers import WeightServers
from tests.support.policies import tiny_hf_model

OPTIONS = SamplingOptions(1.0, 1.0, 0, frozenset({2}))
PLATFORM = Platform("cpu", "gloo", rank=0, world_size=1, local_rank=0)
BUCKET_BYTES = 20_000  # several buckets of a tiny model


class Rollouts(NamedTuple):
    """An engine over servers with everything behind it."""

    engine: SGLangEngine
    fleet: ServerFleet
    sync: WeightPublisher
    replaced: list[int]
    labels: WeightLabels


def model_folder(folder: Path, *, seed: int = 0) -> Path:
    """Returns a Hugging Face folder with a tiny random model (no tokenizer)."""
    model = tiny_hf_model(seed=seed)
    model.save_pretrained(folder)
    return folder


def weights(seed: int) -> dict[str, Tensor]:
    """Returns the tensors of ``model_folder(seed=seed)``."""
    return {name: parameter.detach() for name, parameter in tiny_hf_model(seed=seed).named_parameters()}


def requests(count: int, *, max_new_tokens: int = 6) -> list[GenerateRequest]:
    return [GenerateRequest((3, 4 + place % 5), place, max_new_tokens) for place in range(count)]


@contextmanager
def rollouts(
    urls: Sequence[str],
    folder: Path,
    *,
    api_key: str | None = None,
    max_concurrency: int = 8,
    transport: str = "disk",
    fp8: bool = False,
    **limits: Any,
) -> Iterator[Rollouts]:
    """Yields an engine with short deadlines over ``urls``, the model's configuration being ``folder``'s."""
    hf_config = json.loads((folder / "config.json").read_text())
    chosen: dict[str, Any] = {
        "request_timeout_s": 20.0,
        "max_attempts": 5,
        "max_failures": 3,
        "recovery_timeout_s": 0.5,
        "probe_interval_s": 0.05,
        "transfer_timeout_s": 20.0,
    } | limits
    transfer_timeout_s = chosen.pop("transfer_timeout_s")
    group = Replacements(folder)
    labels = WeightLabels(new_run_id())
    with ExitStack() as stack:
        fleet = stack.enter_context(
            ServerFleet(
                urls,
                ClientOptions(
                    max_concurrency=max_concurrency, connect_timeout_s=2.0, control_timeout_s=10.0, api_key=api_key
                ),
            )
        )
        stack.enter_context(one_rank())
        arch = architecture_from_hf_config(hf_config)
        servers = WeightServers(fleet, arch, labels, timeout_s=transfer_timeout_s, fp8=fp8, group=group)
        chosen_transport = made_transport(transport, servers, folder.parent / "transfer", hf_config)
        stack.callback(chosen_transport.close)
        sync = WeightPublisher(servers, chosen_transport, PLATFORM, recovery_s=chosen["recovery_timeout_s"])
        engine = SGLangEngine(fleet, RequestLimits(**chosen), labels=labels, vocab_size=arch.vocab_size)
        torch.manual_seed(0)
        yield Rollouts(engine, fleet, sync, group.replaced, labels)


def made_transport(
    name: str, servers: WeightServers, folder: Path, hf_config: dict[str, Any], bucket_bytes: int = BUCKET_BYTES
) -> BaseTransport:
    """Returns a transport whose files hold, like its buckets, ``bucket_bytes``."""
    options = TransportOptions(
        folder=folder,
        owner=str(folder),
        hf_config=hf_config,
        max_shard_bytes=bucket_bytes,
        backend="gloo",
        address="127.0.0.1",
        bucket_bytes=bucket_bytes,
    )
    return make_transport(name, servers, options)


@contextmanager
def one_rank() -> Iterator[None]:
    """This process is the one rank of a job, as long as the context lasts."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


class Replacements(ServerGroup):
    """No processes, but a note of those that are to be replaced."""

    def __init__(self, folder: Path) -> None:
        super().__init__(0, LaunchOptions("", str(folder), "127.0.0.1", {}, {}, folder, 1.0, 0, None, ""))
        self.replaced: list[int] = []

    def replace(self, index: int) -> None:
        self.replaced.append(index)

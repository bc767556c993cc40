"""Tiny model folders, transports and engines over servers, for the tests of SGLang rollouts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aer_megatron.convert.hf_config import architecture_from_hf_config
from aer_megatron.rollout.engine import GenerateRequest, SamplingOptions
from aer_megatron.sglang.calls import RequestLimits
from aer_megatron.sglang.disk import DiskSync
from aer_megatron.sglang.distributed import DistributedSync
from aer_megatron.sglang.engine import SGLangEngine
from aer_megatron.sglang.fleet import ServerFleet
from aer_megatron.sglang.http_loop import ClientOptions
from aer_megatron.sglang.protocol import WeightLabels, new_run_id
from aer_megatron.sglang.tensor import TensorSync
from aer_megatron.sglang.weight_sync import ServerSync, SyncContext
from tests.support.policies import tiny_hf_model

OPTIONS = SamplingOptions(1.0, 1.0, 0, frozenset({2}))
TRANSPORTS = ("disk", "distributed", "tensor")
BUCKET_BYTES = 20_000  # several buckets of a tiny model


class Rollouts(NamedTuple):
    """An engine over servers with everything behind it."""

    engine: SGLangEngine
    fleet: ServerFleet
    sync: ServerSync
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
    replaced: list[int] = []
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
        context = SyncContext(
            arch=architecture_from_hf_config(hf_config),
            labels=labels,
            timeout_s=transfer_timeout_s,
            recovery_s=chosen["recovery_timeout_s"],
            leads=True,
            exchange=lambda value: [json.loads(json.dumps(value))],
            replace=replaced.append,
            max_unhashed_bytes=1250 * 10**6,
            fp8=fp8,
        )
        sync = _transport(transport, fleet, context, folder.parent / "transfer", hf_config)
        stack.callback(sync.close)
        engine = SGLangEngine(fleet, RequestLimits(**chosen), labels=labels, vocab_size=context.arch.vocab_size)
        torch.manual_seed(0)
        yield Rollouts(engine, fleet, sync, replaced, labels)


def _transport(
    name: str, fleet: ServerFleet, context: SyncContext, folder: Path, hf_config: dict[str, Any]
) -> ServerSync:
    if name == "distributed":
        return DistributedSync(fleet, context, backend="gloo", address="127.0.0.1", bucket_bytes=BUCKET_BYTES)
    if name == "tensor":
        return TensorSync(fleet, context, bucket_bytes=BUCKET_BYTES)
    return DiskSync(fleet, context, folder=folder, owner=str(folder), hf_config=hf_config, max_shard_bytes=BUCKET_BYTES)

"""Weight transfer to two servers on this machine against moving the same bytes plainly: torch's broadcast, and cp.

Run from the repository's root; writes weight_sync.md and weight_sync.json into --out.
    python -m benchmarks.bench_weight_sync --rounds 7

The servers are benchmarks/weight_receiver.py in two processes: they speak the protocol, copy what arrives into memory
that they have, and hash it when asked, as SGLang does. What is compared is therefore this side. `transfer` is from the
first call until every server has taken the last byte; `verified` adds the checksums, the servers' and the trainer's
(which puts off those of the last 1.25 GB until then: here, of everything), their comparison and the version label;
`written` of the disk transport is when the files are there. The plain broadcast sends the same tensors, one by one, in
one gloo group of three processes; cp copies the folder that the disk transport writes.

Rounds are taken in turns, so that other work on the machine meets all of them alike.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from transformers import Qwen3Config

from aer_megatron.convert.hf_config import architecture_from_hf_config
from aer_megatron.convert.mapping import hf_names
from aer_megatron.sglang.fleet import ServerFleet
from aer_megatron.sglang.http_loop import ClientOptions
from aer_megatron.sglang.labels import WeightLabels, new_run_id
from aer_megatron.sglang.publication import WeightPublisher
from aer_megatron.sglang.server import LaunchOptions, ServerGroup
from aer_megatron.sglang.transports import BaseTransport, TransportOptions, make_transport
from aer_megatron.sglang.transports.disk import Transport as DiskTransport
from aer_megatron.sglang.weight_servers import Published, WeightServers
from tests.support.runs import ROOT
from tests.support.sglang_fixtures import PLATFORM, one_rank

NUM_SERVERS = 2
TRANSPORTS = ("distributed", "disk")
PLAIN = {"distributed transfer": "broadcast", "disk written": "cp"}
BARS = {"distributed transfer": 0.7, "disk written": 0.5}
MODEL = {  # 1.0 GB in fp32
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 14,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 where a transport is below its bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--bucket-mb", type=int, default=64)
    parser.add_argument("--scratch", type=Path, default=Path("/dev/shm"), help="for the files of disk and cp")
    parser.add_argument("--layers", type=int, default=MODEL["num_hidden_layers"])
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    config = Qwen3Config(**{**MODEL, "num_hidden_layers": given.layers}).to_dict()
    arch = architecture_from_hf_config(config)
    weights = {name: torch.randn(shape) for name, shape in hf_names(arch).items()}
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="weight-sync-", dir=given.scratch)))
        urls = stack.enter_context(receivers(scratch, config))
        broadcast = stack.enter_context(plain_broadcast(scratch, weights, given.rounds))
        stack.enter_context(one_rank())
        fleet = stack.enter_context(
            ServerFleet(urls, ClientOptions(max_concurrency=1, connect_timeout_s=5, control_timeout_s=60, api_key=None))
        )
        publications = {
            name: stack.enter_context(publication(name, fleet, config, scratch, given.bucket_mb * 10**6))
            for name in TRANSPORTS
        }
        taken: dict[str, list[float]] = {}
        used: dict[str, list[float]] = {}
        for number in range(given.rounds):
            for name, action in [
                *[(name, functools.partial(publications[name], weights, number)) for name in TRANSPORTS],
                ("broadcast", broadcast),
                ("cp", copy(scratch)),
            ]:
                cpu = cpu_seconds()
                for part, seconds in action().items():
                    taken.setdefault(f"{name} {part}".strip(), []).append(seconds)
                used.setdefault(name, []).append(cpu_seconds() - cpu)
    num_bytes = sum(tensor.nbytes for tensor in weights.values())
    result = {
        "bytes": num_bytes,
        "bucket_mb": given.bucket_mb,
        "scratch": str(given.scratch),
        "load": os.getloadavg()[0],
        "seconds": taken,
        "cpu_seconds": used,
    }
    (given.out / "weight_sync.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = report(result)
    (given.out / "weight_sync.md").write_text(text, encoding="utf-8")
    print(text)
    return int(any(ratio(taken, name) < bar for name, bar in BARS.items()))


@contextmanager
def receivers(scratch: Path, config: dict[str, Any]) -> Iterator[list[str]]:
    """Yields the addresses of two receivers."""
    (scratch / "model").mkdir()
    (scratch / "model" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    options = LaunchOptions(
        python=sys.executable,
        model_path=str(scratch / "model"),
        host="127.0.0.1",
        arguments={},
        environment={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        log_folder=scratch / "logs",
        start_timeout_s=120.0,
        max_restarts=0,
        api_key=None,
        reached_at="",
    )

    def command(options: LaunchOptions, port: int) -> list[str]:
        program = [options.python, "-m", "benchmarks.weight_receiver", "--model-path", options.model_path]
        return [*program, "--host", options.host, "--port", str(port)]

    with ServerGroup(NUM_SERVERS, options, command=command) as group:
        yield group.start()


class TimedServers(WeightServers):
    """Notes when a server has taken the last byte: its verification begins."""

    arrived: list[float]

    def verify(self, index: int, published: Published) -> None:
        self.arrived.append(time.perf_counter())
        super().verify(index, published)


@contextmanager
def publication(
    name: str, fleet: ServerFleet, config: dict[str, Any], scratch: Path, bucket_bytes: int
) -> Iterator[Any]:
    """Yields what publishes (weights, version) through a transport and returns its seconds."""
    arch = architecture_from_hf_config(config)
    servers = TimedServers(fleet, arch, WeightLabels(new_run_id()), timeout_s=300.0, fp8=False)
    options = TransportOptions(
        folder=scratch / "transfer",
        owner=str(scratch),
        hf_config=config,
        max_shard_bytes=5 * 10**9,
        backend="gloo",
        address="127.0.0.1",
        bucket_bytes=bucket_bytes,
    )
    transport = make_transport(name, servers, options)
    written = noted_writes(transport)
    publisher = WeightPublisher(servers, transport, PLATFORM, recovery_s=1.0)

    def publish(weights: dict[str, Tensor], version: int) -> dict[str, float]:
        servers.arrived = []
        began = time.perf_counter()
        publisher.publish(iter(weights.items()), version)
        taken = {"transfer": min(servers.arrived) - began, "verified": time.perf_counter() - began}
        return {"written": written[-1] - began} | taken if written else taken

    yield publish
    transport.close()


def noted_writes(transport: BaseTransport) -> list[float]:
    """Returns the times, one more for every publication, when the disk transport has written its files."""
    written: list[float] = []
    if isinstance(transport, DiskTransport):
        write = transport._write

        def noted_write(target: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
            write(target, tensors)
            written.append(time.perf_counter())

        transport._write = noted_write  # type: ignore[assignment,method-assign]
    return written


@contextmanager
def plain_broadcast(scratch: Path, weights: dict[str, Tensor], rounds: int) -> Iterator[Any]:
    """Yields what has three processes broadcast such weights, tensor by tensor, and returns its seconds."""
    method = f"file://{scratch}/broadcast"
    shapes = [tuple(tensor.shape) for tensor in weights.values()]
    ours, theirs = mp.get_context("spawn").Pipe()
    context = mp.spawn(_broadcast, (method, shapes, rounds, theirs), nprocs=1 + NUM_SERVERS, join=False)

    def broadcast() -> dict[str, float]:
        ours.send("next round")
        return {"": ours.recv()}

    yield broadcast
    while not context.join():
        pass


def _broadcast(rank: int, method: str, shapes: list[tuple[int, ...]], rounds: int, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=1 + NUM_SERVERS)
    held = [torch.randn(shape) if rank == 0 else torch.empty(shape) for shape in shapes]
    for _ in range(rounds):
        if rank == 0:
            pipe.recv()
        dist.barrier()
        began = time.perf_counter()
        for tensor in held:
            dist.broadcast(tensor, 0)
        dist.barrier()
        if rank == 0:
            pipe.send(time.perf_counter() - began)
    dist.destroy_process_group()


def copy(scratch: Path) -> Any:
    """Returns what copies the disk transport's folder and returns its seconds."""

    def run() -> dict[str, float]:
        (source,) = (scratch / "transfer").iterdir()
        target = scratch / "copied"
        shutil.rmtree(target, ignore_errors=True)
        began = time.perf_counter()
        subprocess.run(["cp", "-r", str(source), str(target)], check=True)
        return {"": time.perf_counter() - began}

    return run


def cpu_seconds() -> float:
    """Returns the processor time of this process and all it started that still run."""
    rows = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = file.read_text().rpartition(")")[2].split()
            rows[int(file.parent.name)] = (int(fields[1]), int(fields[11]) + int(fields[12]))
    own = {os.getpid()}
    while more := {pid for pid, (parent, _) in rows.items() if parent in own} - own:
        own |= more
    return sum(rows[pid][1] for pid in own) / os.sysconf("SC_CLK_TCK")


def ratio(taken: dict[str, list[float]], name: str) -> float:
    """Returns the plain way's median time over ours: 1 = as fast."""
    return float(np.median(taken[PLAIN[name]]) / np.median(taken[name]))


def report(result: dict[str, Any]) -> str:
    """Returns the page."""
    taken, size = result["seconds"], result["bytes"] / 1e9
    rounds = len(taken["cp"])
    lines = [
        "# Weight transfer on one machine",
        "",
        f"`python -m benchmarks.bench_weight_sync --rounds {rounds}`: {size:.2f} GB of fp32 weights, two receivers,",
        f"buckets of {result['bucket_mb']} MB, {os.cpu_count()} cores, rounds in turns. `transfer` ends when every",
        "receiver has taken the last byte, `verified` when its checksums were compared and its version was set.",
        f"Files lie in {result['scratch']}. Trainer and servers hash after the transfer; of larger models the",
        "trainer hashes all but the last 1.25 GB during it, which slows it down where three processes share two cores.",
        f"Seconds: median (lowest to highest). Load average of the machine at the end: {result['load']:.0f}.",
        "",
        "| way | seconds | GB/s |",
        "|---|---|---|",
    ]
    for name, seconds in taken.items():
        middle = float(np.median(seconds))
        lines.append(f"| {name} | {middle:.2f} ({min(seconds):.2f} to {max(seconds):.2f}) | {size / middle:.2f} |")
    lines += ["", "Processor time of all processes, verification included:", "", "| way | seconds |", "|---|---|"]
    for name, seconds in result["cpu_seconds"].items():
        lines.append(f"| {name} | {float(np.median(seconds)):.2f} ({min(seconds):.2f} to {max(seconds):.2f}) |")
    lines += ["", "| way | against | speed, 1 = as fast | bar |", "|---|---|---|---|"]
    for name, bar in BARS.items():
        lines.append(f"| {name} | {PLAIN[name]} | {ratio(taken, name):.2f} | {bar} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())

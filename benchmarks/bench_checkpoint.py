"""How long a checkpoint stops training: written in place, written beside training, and two peers; one run, ratios.

    .venv/bin/python -m benchmarks.bench_checkpoint                # 1 GB on the disk of --folder; some 4 GB of memory
    .venv/bin/python -m benchmarks.bench_checkpoint --device cuda

One rank, a Qwen3-shaped model in fp32, about `--gigabytes` of weights and moments. Every round, in changing order:

  in place           `begin(beside=False)`: write, SHA-256, fsync, manifest, rename; training waits for all of it
  beside             `begin(beside=True)`: what training waits for (the copy); then one update runs, then `wait()`
  torch.save         the same tensors to one file and its fsync: no digest, no manifest, no agreement
  safetensors        `save_file` of the same tensors and its fsync, likewise
  DCP async_save     torch.distributed.checkpoint.async_save of the same tensors: what training waits for

The ratio of each round is taken to its own `in place`, so that a load that comes and goes counts in both; medians are
given. `--warmup` rounds, which allocate buffers, are not counted but shown as the first save. Writes
benchmarks/results/checkpoint.{md,json}. This file does NOT judge the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed import checkpoint as dcp

from aer_megatron.actor.actor import Actor
from aer_megatron.checkpoint.store import CheckpointStore
from aer_megatron.checkpoint.tensors import own_files
from aer_megatron.convert.hf_config import architecture_from_hf_config
from aer_megatron.convert.random_weights import random_hf_weights
from aer_megatron.parallel.platform import install_platform
from aer_megatron.parallel.topology import initialize_topology
from tests.support.policies import policy_config
from tests.support.updates import uniform_batch

RESULTS = Path(__file__).parent / "results"
LAYERS, VOCAB = 8, 4096
FORMS = ("in place", "beside", "torch.save", "safetensors", "DCP async_save")


def build(gigabytes: float, device: torch.device) -> Actor:
    """Returns an actor of about ``gigabytes`` of weights and moments, after one update."""
    hidden = 64  # heads of 64 each
    while 12 * (LAYERS * 16 * hidden**2 + 2 * VOCAB * hidden) < gigabytes * 1e9:
        hidden += 64
    heads = hidden // 64
    table = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": hidden,
        "num_hidden_layers": LAYERS, "num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": 64,
        "intermediate_size": 4 * hidden, "vocab_size": VOCAB, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
        "rope_theta": 1e4, "tie_word_embeddings": False, "hidden_act": "silu",
    }  # fmt: skip
    config = policy_config()
    actor = Actor(
        architecture_from_hf_config(table),
        config,
        initialize_topology(tp=1, pp=1, seed=0),
        device=device,
        optimizer=config.optimizer,
        num_updates_planned=100,
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(table), encoding="utf-8")
        actor.load_hf_weights(random_hf_weights(folder, 0))
    update(actor)
    return actor


def update(actor: Actor) -> None:
    actor.train(uniform_batch(1, 32, vocab_size=VOCAB, old_logprob=-8.0), seed=0, entropy_gradient=False)


def seconds(work: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


class Bench:
    """One actor, its two stores and the peers' files in ``folder``."""

    def __init__(self, actor: Actor, folder: Path, device: torch.device) -> None:
        self.actor, self.folder = actor, folder
        self.stores = {
            name: CheckpointStore(folder / name, topology=actor.topology, device=device, keep=1)
            for name in ("in place", "beside")
        }
        self.step = 0

    def tensors(self) -> dict[str, torch.Tensor]:
        files = own_files(self.actor).values()
        return {f"{part}/{name}": tensor for part, tensors in files for name, tensor in tensors.items()}

    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def round(self) -> dict[str, float]:
        """Returns seconds that training waits for each form, and how long the one beside took to be on disk.

        The forms take turns in another order every round: a file that was just deleted leaves memory for the next one.
        """
        self.step += 1
        works = [self.in_place, self.beside, self.torch_save, self.safetensors, self.dcp]
        place = self.step % len(works)
        times: dict[str, float] = {}
        for work in works[place:] + works[:place]:
            times |= work()
        return times

    def begin(self, name: str, *, beside: bool) -> float:
        store = self.stores[name]
        return seconds(partial(store.begin, self.actor, step=self.step, state={}, files={}, beside=beside))

    def in_place(self) -> dict[str, float]:
        waited = self.begin("in place", beside=False)
        self.stores["in place"].wait()
        return {"in place": waited}

    def beside(self) -> dict[str, float]:
        start = time.perf_counter()
        times = {"beside": self.begin("beside", beside=True), "update beside": seconds(lambda: update(self.actor))}
        self.stores["beside"].wait()
        times["beside, until on disk"] = time.perf_counter() - start
        return times | {"update alone": seconds(lambda: update(self.actor))}

    def torch_save(self) -> dict[str, float]:
        return {"torch.save": self.file(lambda path: torch.save(self.tensors(), path))}

    def safetensors(self) -> dict[str, float]:
        def write(path: Path) -> None:
            save_file({name: tensor.cpu().contiguous() for name, tensor in self.tensors().items()}, path)

        return {"safetensors": self.file(write)}

    def file(self, write: Callable[[Path], None]) -> float:
        """Returns the seconds of a write and its fsync; the file before is deleted after it, as by a store."""
        fresh, final = self.folder / "peer.new", self.folder / "peer"

        def work() -> None:
            write(fresh)
            flush(fresh)
            fresh.replace(final)

        return seconds(work)

    def dcp(self) -> dict[str, float]:
        folder = self.folder / "peer-dcp"
        pending: list[Any] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            waited = seconds(lambda: pending.append(dcp.async_save(self.tensors(), checkpoint_id=str(folder))))
            pending[0].result()
        shutil.rmtree(folder)
        return {"DCP async_save": waited}


def table(rounds: list[dict[str, float]], first: dict[str, float]) -> list[str]:
    lines = ["| what training waits for | median s | to in place | all ratios | first save, s |"]
    lines.append("|---|---|---|---|---|")
    for form in FORMS:
        ratios = [row[form] / row["in place"] for row in rounds]
        median = statistics.median(row[form] for row in rounds)
        spread = f"{min(ratios):.3f} - {max(ratios):.3f}"
        lines.append(f"| {form} | {median:.3f} | {statistics.median(ratios):.3f} | {spread} | {first[form]:.3f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="disk that is written to")
    parser.add_argument("--output", type=Path, default=RESULTS / "checkpoint.json")
    options = parser.parse_args()
    install_platform()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        dist.init_process_group("cpu:gloo,cuda:nccl" if options.device == "cuda" else "gloo",
                                init_method=f"file://{folder}/group", rank=0, world_size=1)  # fmt: skip
        device = torch.device(options.device)
        bench = Bench(build(options.gigabytes, device), Path(folder), device)
        rows = []
        for number in range(options.warmup + options.rounds):
            rows.append(bench.round())
            print(number, ", ".join(f"{name} {value:.3f}" for name, value in rows[-1].items()), flush=True)
        result = {
            "gigabytes": bench.num_bytes() / 1e9,
            "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s)",
            "load": os.getloadavg()[0],
            "first": rows[0],
            "rounds": rows[options.warmup :],
        }
        dist.destroy_process_group()
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    options.output.with_suffix(".md").write_text(page(result), encoding="utf-8")
    print(page(result))


def page(result: dict[str, Any]) -> str:
    rounds = result["rounds"]
    on_disk = statistics.median(row["beside, until on disk"] for row in rounds)
    slower = statistics.median(row["update beside"] / row["update alone"] for row in rounds)
    return "\n".join(
        [
            "# Checkpoints: what training waits for",
            "",
            f"`python -m benchmarks.bench_checkpoint`: {result['gigabytes']:.2f} GB, {result['device']}, "
            f"{result['machine']}, load {result['load']:.1f} at the end; {len(rounds)} rounds. The forms are described "
            "in that file.",
            "",
            *table(rounds, result["first"]),
            "",
            f"The checkpoint beside training is on disk after {on_disk:.2f} s (median, with the update after `begin`);",
            f"an update beside it takes {slower:.2f} times as long as alone.",
            "",
        ]
    )


if __name__ == "__main__":
    main()

"""One device: the entropy head against its peers, and a policy update's time, MFU and memory against the plan.

    python -m benchmarks.bench_gpu head --out FILE.json
    python -m benchmarks.bench_gpu update --config examples/plan/qwen3-8b-base/config.json --layers 8 --out FILE.json
    python -m benchmarks.bench_gpu update ... --set megatron.fp8=hybrid --set megatron.fp8_recipe=tensorwise

Runs on whatever device the trainer would take; without CUDA the sizes have to be small and peaks are not measured.
`head`: hidden states [N, H] and a weight [V, H] to log-probability, entropy and both gradients. `update`: Actor.train
on random weights and tokens, one optimizer step per call. MFU is 6 N D + attention (costs/step.py) over time and
the data-sheet peak in bf16, recomputation not counted. Times are medians of --repeats after --warmup, synchronised.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aer_megatron.actor.actor import Actor
from aer_megatron.config_loading import load_config
from aer_megatron.convert.hf_config import architecture_from_hf_config
from aer_megatron.convert.mapping import hf_specs
from aer_megatron.costs.hardware import gpu_named
from aer_megatron.costs.memory import TrainingForm
from aer_megatron.costs.model_size import Layout
from aer_megatron.costs.step import Workload, step_flops
from aer_megatron.parallel.fused_head import fused_linear_logprob_entropy
from aer_megatron.parallel.platform import Platform, initialize_process_group, install_platform
from aer_megatron.parallel.topology import destroy_topology, initialize_topology
from aer_megatron.plan import command as plan
from tests.support.updates import uniform_batch

RUN_FILE = """\
[run]
output_dir = "runs/bench"
[model]
path = "{path}"
dtype = "bf16"
vocab_multiple = 128
[parallel]
micro_batch_size = {micro}
[data]
max_prompt_tokens = {prompt}
train = {{ task = "countdown" }}
[rollout]
engine = "sglang"
prompts_per_step = {sequences}
group_size = 1
max_new_tokens = {response}
[algo.advantage]
kind = "dr_grpo"
[sglang]
num_servers = 1
"""


def textbook(hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor]:
    """Returns log-probability and entropy [T] of whole logits, as anyone would write them."""
    logp_TV = torch.log_softmax((hidden_TH @ weight_VH.t()).float(), dim=-1)
    return logp_TV.gather(1, labels_T[:, None]).squeeze(1), -(logp_TV.exp() * logp_TV).sum(-1)


def fused(hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor]:
    scores = fused_linear_logprob_entropy(hidden_TH, weight_VH, labels_T)
    return scores.logprob_T, scores.entropy_T


def timed(call: Callable[[], object], platform: Platform, *, warmup: int, repeats: int) -> dict[str, Any]:
    """Returns median seconds of ``call`` and the peak bytes that it adds (None without CUDA)."""
    cuda = platform.device_type == "cuda"
    for _ in range(warmup):
        call()
    torch.cuda.synchronize()
    before = 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if cuda else None
    return {
        "seconds": statistics.median(seconds),
        "peak_bytes": peak,
        "added_bytes": peak - before if peak is not None else None,
    }


def bench_head(options: argparse.Namespace, platform: Platform) -> list[dict[str, Any]]:
    """Returns one record per form of the head."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"device": platform.device, "dtype": torch.bfloat16}
    hidden_TH = torch.randn(options.tokens, options.hidden, **shape).requires_grad_()
    weight_VH = (0.02 * torch.randn(options.vocab, options.hidden, **shape)).requires_grad_()
    labels_T = torch.randint(0, options.vocab, (options.tokens,), device=platform.device)
    forms: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"fused": fused, "textbook": textbook}
    if platform.device_type == "cuda":
        forms["textbook, torch.compile"] = torch.compile(textbook)
    records = []
    for name, form in forms.items():

        def step(form: Callable[..., tuple[Tensor, Tensor]] = form) -> None:
            logprob_T, entropy_T = form(hidden_TH, weight_VH, labels_T)
            (logprob_T.sum() + 0.1 * entropy_T.sum()).backward()
            hidden_TH.grad = weight_VH.grad = None

        record = {"what": "head", "form": name, "tokens": options.tokens, "vocab": options.vocab}
        try:
            records.append(record | timed(step, platform, warmup=options.warmup, repeats=options.repeats))
        except torch.OutOfMemoryError as error:
            records.append(record | {"error": str(error).splitlines()[0]})
    return records


def bench_update(options: argparse.Namespace, platform: Platform) -> list[dict[str, Any]]:
    """Returns one record: time, MFU and memory of a policy update, and what the plan says of the memory."""
    table = json.loads(options.config.read_text(encoding="utf-8"))
    table["num_hidden_layers"] = options.layers or table["num_hidden_layers"]
    prompt, response = options.length // 4, options.length - options.length // 4
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(table), encoding="utf-8")
        run_file = Path(folder) / "run.toml"
        run_file.write_text(RUN_FILE.format(path=folder, micro=options.micro_batch, prompt=prompt, response=response,
                                            sequences=options.sequences), encoding="utf-8")  # fmt: skip
        overrides = [f"--{item}" for item in options.set]
        config = load_config(run_file, overrides)
        planned = planned_peak_bytes(run_file, overrides, platform, options.gpu)
    arch = architecture_from_hf_config(table)
    topology = initialize_topology(tp=config.parallel.tp, pp=1, seed=0)
    actor = Actor(arch, config, topology, device=platform.device, optimizer=config.optimizer, num_updates_planned=1000)
    specs = hf_specs(arch, torch.bfloat16)
    actor.load_hf_weights(lambda name: 0.02 * torch.randn(specs[name].shape))
    vocab = int(table["vocab_size"])
    given = uniform_batch(options.sequences, options.length, vocab_size=vocab, old_logprob=-math.log(vocab))

    def step() -> None:
        actor.train(given, seed=0, entropy_gradient=True)

    measured = timed(step, platform, warmup=options.warmup, repeats=options.repeats)
    work = Workload(options.sequences, prompt, response, minibatches=1, passes=0)
    form = TrainingForm(2, "flash", config.model.head, vocab, 0, False)
    layout = Layout(config.parallel.tp, 1, platform.world_size // config.parallel.tp, 1, False, "none")
    flops = step_flops(arch, work, layout, form).model / platform.world_size
    peak = gpu_named(options.gpu).bf16_flops
    return [
        {
            "what": "update",
            "config": str(options.config),
            "layers": table["num_hidden_layers"],
            "set": options.set,
            "sequences": options.sequences,
            "length": options.length,
            "ranks": platform.world_size,
            "tokens_per_second": options.sequences * options.length / measured["seconds"],
            "mfu": flops / measured["seconds"] / peak if platform.device_type == "cuda" else None,
            "planned_peak_bytes": planned,
            **measured,
        }
    ]


def planned_peak_bytes(run_file: Path, overrides: list[str], platform: Platform, gpu: str) -> float | None:
    """Returns the plan's peak per GPU; None where it has no answer."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        plan.main([str(run_file), "--gpus", str(platform.world_size), "--gpu", gpu, "--top", "0", *overrides])
    found = re.search(r"^  peak +([0-9.,]+)", printed.getvalue(), flags=re.M)
    return float(found[1].replace(",", "")) * 1e9 if found else None


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["head", "update"])
    parser.add_argument("--out", type=Path, required=True, help="JSON file that gets the records")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=8192, help="head: rows")
    parser.add_argument("--hidden", type=int, default=4096, help="head: hidden size")
    parser.add_argument("--vocab", type=int, default=151936, help="head: columns")
    parser.add_argument("--config", type=Path, help="update: config.json of the model")
    parser.add_argument("--layers", type=int, default=0, help="update: as many layers of it; 0 = all")
    parser.add_argument("--sequences", type=int, default=16, help="update: over all ranks")
    parser.add_argument("--length", type=int, default=4096, help="update: tokens of a sequence")
    parser.add_argument("--micro-batch", type=int, default=1, help="update: sequences of a micro-batch")
    parser.add_argument("--gpu", default="h100", help="update: whose data sheet")
    parser.add_argument("--set", action="append", default=[], help="update: section.key=value of the run file")
    options = parser.parse_args(arguments)
    platform = install_platform()
    initialize_process_group(platform)
    try:
        records = (bench_head if options.what == "head" else bench_update)(options, platform)
    finally:
        destroy_topology()
    if platform.rank == 0:
        name = torch.cuda.get_device_name() if platform.device_type == "cuda" else "cpu"
        for record in records:
            record["device"] = name
            print(json.dumps(record))
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Peak memory and time of log-probability + entropy on sharded logits, forward and backward, against other forms.

Run from the repository's root; writes vocab_entropy.json and vocab_entropy.md into --out:
    python -m benchmarks.bench_vocab_entropy --shapes 1024x8192 2048x32768 --tp 1 2

Peaks are sums of live tensor storages (logits included; hidden states and the head's weight, which exist anyway, are
not) in units U of one float32 [N, V / TP] tensor. Times are the shortest of --repeats passes, taken in turns so that
every form meets the same load; CPU seconds are less sensitive to other programs than wall seconds.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from aer_megatron.parallel.fused_head import fused_linear_logprob_entropy
from aer_megatron.parallel.vocab import vocab_parallel_logprob_entropy
from tests.support.spawn import run_distributed
from tests.support.storage_tracker import StorageTracker

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# An upper bound of the peak in U, to leave out what does not fit into --memory-gb.
LARGEST_PEAK = {"naive": 6.0, "megatron": 2.5, "in-place": 1.2, "fused": 0.5, "head+naive": 6.5, "head+in-place": 1.6}


@dataclass(frozen=True, slots=True)
class Setting:
    """One cell of the benchmark: tokens, vocabulary of all ranks together, TP size, hidden size of the head."""

    tokens: int
    vocab: int
    tp: int
    hidden: int

    @property
    def columns(self) -> int:
        return self.vocab // self.tp

    @property
    def unit(self) -> int:
        return 4 * self.tokens * self.columns


@dataclass(frozen=True, slots=True)
class Record:
    """One measured form on one setting; `naive` forms see their shard as a whole vocabulary and never communicate."""

    form: str
    dtype: str
    tokens: int
    vocab: int
    tp: int
    entropy: bool
    peak_u: float
    wall_s: float
    cpu_s: float


def naive(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns log p and entropy, stacked, in the textbook way."""
    logp = torch.log_softmax(logits.float(), dim=-1)
    return torch.stack((logp.gather(1, labels[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)))


class Case:
    """The tensors of one form and dtype, allocated when the form runs and freed after it."""

    def __init__(self, setting: Setting, form: str, dtype: str, group: dist.ProcessGroup | None) -> None:
        self.setting, self.form, self.group = setting, form, group
        generator = torch.Generator().manual_seed(dist.get_rank())
        common = torch.Generator().manual_seed(99)
        self.with_head = form.startswith(("fused", "head"))
        self.labels = torch.randint(0, setting.columns, (setting.tokens,), generator=common)
        self.weights = torch.randn(2, setting.tokens, generator=common)
        if self.with_head:
            shape = (setting.columns, setting.hidden)
            self.hidden = torch.randn(setting.tokens, setting.hidden, generator=common).to(DTYPES[dtype])
            self.head = (torch.randn(shape, generator=generator) / setting.hidden**0.5).to(DTYPES[dtype])
            self.hidden.requires_grad_()
            self.head.requires_grad_()
            self.head.main_grad = torch.zeros(shape)  # type: ignore[attr-defined]
        else:
            self.logits = torch.empty(setting.tokens, setting.columns, dtype=DTYPES[dtype])

    def refresh(self) -> None:
        """Makes new inputs, untimed: the in-place forms consume theirs."""
        if self.with_head:
            self.hidden.grad = self.head.grad = None
        else:
            self.logits = self.logits.detach().normal_().requires_grad_()

    def tracker(self) -> StorageTracker:
        if not self.with_head:
            return StorageTracker(self.labels, self.weights)
        main_grad = self.head.main_grad  # type: ignore[attr-defined]
        return StorageTracker(self.labels, self.weights, self.hidden, self.head, main_grad)

    def forward(self) -> Tensor:
        """Returns the weighted sum of the outputs, a scalar."""
        if self.form == "fused":
            result = fused_linear_logprob_entropy(self.hidden, self.head, self.labels, tp_group=self.group)
            return (torch.stack(result[:2]) * self.weights).sum()  # type: ignore[arg-type]
        logits = self.hidden @ self.head.t() if self.with_head else self.logits.view_as(self.logits)
        if self.form.endswith("in-place"):
            result = vocab_parallel_logprob_entropy(logits, self.labels, tp_group=self.group)
            return (torch.stack(result[:2]) * self.weights).sum()  # type: ignore[arg-type]
        if self.form == "megatron":
            from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

            loss = vocab_parallel_cross_entropy(logits[:, None], self.labels[:, None]).squeeze(1)
            return (loss * self.weights[0]).sum()
        return (naive(logits, self.labels) * self.weights).sum()


def _time(case: Case) -> tuple[float, float]:
    case.refresh()
    if case.group is not None:
        dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    case.forward().backward()
    return time.perf_counter() - wall, time.process_time() - cpu


def _peak(case: Case) -> float:
    case.refresh()
    with case.tracker() as tracker:
        if not case.with_head:
            tracker.track(case.logits)
        case.forward().backward()
    return tracker.peak_bytes / case.setting.unit


def _worker(rank: int, world_size: int, setting: Setting, forms: list[tuple[str, str]], repeats: int) -> list[Any]:
    from aer_megatron.parallel.platform import install_platform
    from aer_megatron.parallel.topology import initialize_topology

    install_platform()
    initialize_topology(tp=world_size, pp=1, seed=1)
    group = dist.group.WORLD if world_size > 1 else None
    peaks: list[float] = []
    times: list[list[tuple[float, float]]] = [[] for _ in forms]
    for turn in range(repeats + 1):  # the first turn measures memory, and is the warm-up
        for index, (form, dtype) in enumerate(forms):
            case = Case(setting, form, dtype, group)
            if turn == 0:
                peaks.append(_peak(case))
            else:
                times[index].append(_time(case))
            del case
            gc.collect()
    return [(peak, min(w for w, _ in t), min(c for _, c in t)) for peak, t in zip(peaks, times, strict=True)]


def _fits(setting: Setting, form: str, memory_gb: float) -> bool:
    head = 8 * setting.columns * setting.hidden if form.startswith(("fused", "head")) else 0
    return setting.tp * (LARGEST_PEAK[form] * setting.unit + head) <= memory_gb * 1e9


def measure(setting: Setting, forms: list[tuple[str, str]], repeats: int, memory_gb: float) -> list[Record]:
    """Returns one record per form that fits into memory: the largest peak and time over the ranks."""
    fitting = [pair for pair in forms if _fits(setting, pair[0], memory_gb)]
    ranks = run_distributed(_worker, setting.tp, setting, fitting, repeats, timeout_s=3600)
    records = []
    for index, (form, dtype) in enumerate(fitting):
        peak, wall, cpu = (max(rank[index][value] for rank in ranks) for value in range(3))
        records.append(
            Record(form, dtype, setting.tokens, setting.vocab, setting.tp, form != "megatron", peak, wall, cpu)
        )
    return records


def _ratio_base(record: Record, records: list[Record]) -> Record | None:
    """Returns the naive record that a record is compared with: same dtype, and with a head if it has one."""
    base = "head+naive" if record.form.startswith(("fused", "head")) else "naive"
    for other in records:
        same = (other.tokens, other.vocab, other.tp) == (record.tokens, record.vocab, record.tp)
        if same and other.form == base and other.dtype == record.dtype:
            return other
    return None


def markdown(records: list[Record], environment: dict[str, str]) -> str:
    """Returns the results as a table with the conditions they were measured under."""
    lines = ["# Log-probability and entropy on sharded logits: peak memory and time, forward + backward", ""]
    lines += [f"- {name}: `{value}`" for name, value in environment.items()]
    lines += [
        "- U: one float32 [N, V / TP] tensor; logits count, hidden states, head weight and its main_grad do not",
        "- naive / this: time of the naive form of the same dtype (its shard is a whole vocabulary to it, it never "
        "communicates) over this form's time, with the head's products for `fused` and `head+`; more is faster",
        "- megatron: `vocab_parallel_cross_entropy`, which has no entropy",
        "",
        "| N | V | TP | form | logits | peak, U | wall, s | CPU, s | naive / this, wall | naive / this, CPU |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in records:
        base = _ratio_base(r, records)
        ratios = f"{base.wall_s / r.wall_s:.2f} | {base.cpu_s / r.cpu_s:.2f}" if base else "- | -"
        lines.append(
            f"| {r.tokens} | {r.vocab} | {r.tp} | {r.form} | {r.dtype} | {r.peak_u:.3f} | {r.wall_s:.3f} | "
            f"{r.cpu_s:.3f} | {ratios} |"
        )
    return "\n".join(lines) + "\n"


def _environment(arguments: list[str]) -> dict[str, str]:
    def git(*command: str) -> str:
        finished = subprocess.run(["git", *command], capture_output=True, text=True, check=False)
        return finished.stdout.strip() if finished.returncode == 0 else ""

    commit = git("rev-parse", "--short", "HEAD") or "none"
    return {
        "command": shlex.join(["python", "-m", "benchmarks.bench_vocab_entropy", *arguments]),
        "commit": commit + (" with uncommitted changes" if git("status", "--porcelain") else ""),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "threads per rank": "1",
    }


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", required=True, help="NxV: tokens x columns of ONE rank")
    parser.add_argument("--tp", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--hidden", type=int, default=256, help="hidden size of the forms with a head")
    parser.add_argument("--forms", nargs="+", choices=sorted(LARGEST_PEAK), default=sorted(LARGEST_PEAK))
    parser.add_argument("--dtypes", nargs="+", choices=sorted(DTYPES), default=["fp32", "bf16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-gb", type=float, default=8.0, help="leave out forms that need more, all ranks")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--append", action="store_true", help="keep the records already in --out")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    options = _parse(arguments)
    forms = [(form, dtype) for dtype in options.dtypes for form in options.forms]
    environment, records = _environment(arguments), []
    json_path = options.out / "vocab_entropy.json"
    if options.append:
        before = json.loads(json_path.read_text())
        records = [Record(**record) for record in before["records"]]
        environment["command"] = before["environment"]["command"] + " && " + environment["command"]
    for shape in options.shapes:
        tokens, columns = (int(number) for number in shape.split("x"))
        for tp in options.tp:
            setting = Setting(tokens, columns * tp, tp, options.hidden)
            measured = measure(setting, forms, options.repeats, options.memory_gb)
            print(markdown(measured, {}), flush=True)
            records += measured
    options.out.mkdir(parents=True, exist_ok=True)
    json_path.write_text(
        json.dumps({"environment": environment, "records": [asdict(record) for record in records]}, indent=1) + "\n"
    )
    (options.out / "vocab_entropy.md").write_text(markdown(records, environment))


if __name__ == "__main__":
    main(sys.argv[1:])

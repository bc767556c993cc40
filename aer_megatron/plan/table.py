"""The plan's tables: memory of one layout term by term, the layouts that fit, and a layout as lines of a run file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from aer_megatron.costs.step import Candidate

_NAMES = ("", "micro-", "batch", "peak", "free", "tp", "cp", "pp", "dp", "sync", "rollout", "score", "train", "step")
_UNITS = ("seq", "tokens", "budget", *7 * ("GB",), *4 * ("s",))


def gigabytes(value: float) -> str:
    """Returns bytes as GB (10^9) with one decimal."""
    return f"{value / 1e9:,.1f}"


def memory_lines(
    own: Candidate, *, usable_bytes: float, dtype: str, head_bytes: Mapping[str, float], beside: bool
) -> list[str]:
    """Returns the terms of one layout; ``head_bytes`` is what each form of the head would take.

    ``beside``: checkpoints are written beside training, from a copy in host memory.
    """
    memory, engine = own.memory, own.engine
    rows: list[tuple[str, float, str]] = [
        ("weights", memory.weights, dtype),
        ("gradients", memory.gradients, "fp32"),
        ("optimizer", memory.optimizer, f"AdamW sharded over dp x cp {own.layout.num_replicas}"),
        ("rollout weights", engine.weights, "embedded engine: the whole model on every rank"),
        ("rollout servers", own.served, "co-located, --rollout-share"),
        ("- update", memory.transient, "the largest of these three counts"),
        ("    activations", memory.activations, f"recompute {own.layout.recompute}"),
        ("    head", memory.head, "; ".join(f"{head} {gigabytes(value)}" for head, value in head_bytes.items())),
        ("    backward", memory.working, ""),
        ("- rollout", engine.rollout, "KV cache, prefill, sampling"),
        ("- weight sync", engine.sync, "second copy of the engine's weights, gathered buckets"),
    ]
    title = f"({own.layout.text}, micro-batches of {own.micro_batch_size}), stage {own.stage}, GB"
    lines = ["", f"memory per GPU of the run file's layout {title}"]
    lines += [f"  {name:<18}{gigabytes(value):>8}  {note}".rstrip() for name, value, note in rows if value]
    state = "fits" if own.peak_bytes <= usable_bytes else "DOES NOT FIT"
    lines.append(f"  {'peak':<18}{gigabytes(own.peak_bytes):>8}  {state} in {gigabytes(usable_bytes)}")
    if beside:
        lines.append(f"  {'host memory':<18}{gigabytes(memory.checkpoint):>8}  the copy for run.async_checkpoint")
    return lines


def layout_lines(
    rows: Sequence[tuple[Candidate, int]], *, num_found: int, length: int, usable_bytes: float
) -> list[str]:
    """Returns the table of (candidate, most micro-batch tokens that fit), best first, and the first as a run file."""
    if not rows:
        return []
    lines = [
        "",
        f"layouts that fit, best first ({num_found} found); times are ESTIMATES from data-sheet peaks, never measured; "
        "traffic is GB sent per GPU and step",
        _row("layout", _NAMES),
        _row("", _UNITS),
    ]
    for candidate, budget in rows:
        traffic, time = candidate.traffic, candidate.time
        sizes = (candidate.micro_batch_size, candidate.micro_batch_size * length, budget)
        memory = (candidate.peak_bytes, usable_bytes - candidate.peak_bytes)
        sent = (traffic.tensor, traffic.context, traffic.pipeline, traffic.data, traffic.weight_sync)
        seconds = (time.rollout, time.score, time.train, time.total)
        cells = [f"{n:,}" for n in sizes] + [gigabytes(n) for n in memory + sent] + [f"{n:,.1f}" for n in seconds]
        lines.append(_row(candidate.layout.text, cells))
    return [*lines, "", "for the run file:", *run_file_lines(rows[0][0])]


def run_file_lines(candidate: Candidate) -> list[str]:
    """Returns the sections of a run file that ask for the candidate."""
    layout = candidate.layout
    table: dict[str, Any] = {"tp": layout.tp, "pp": layout.pp}
    for name, size in (("vpp", layout.vpp), ("cp", layout.cp), ("ep", layout.ep)):
        if size > 1:
            table[name] = size
    table |= {"sequence_parallel": layout.sequence_parallel, "micro_batch_size": candidate.micro_batch_size}
    lines = ["  [parallel]", *(f"  {key} = {json.dumps(value)}" for key, value in table.items())]
    full = {"granularity": "full", "method": "uniform", "num_layers": 1} if layout.recompute == "full" else {}
    return lines + ["  [megatron]"] * bool(full) + [f"  recompute_{k} = {json.dumps(v)}" for k, v in full.items()]


def _row(name: str, cells: Sequence[str]) -> str:
    return f"  {name:<38}" + "".join(f"{cell:>9}" for cell in cells)

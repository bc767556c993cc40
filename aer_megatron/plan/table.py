"""What a plan says: the step, memory of one layout term by term, the layouts that fit, one as lines of a run file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from aer_megatron.costs.memory import HeadForm, head_memory, kv_bytes_per_token
from aer_megatron.costs.model_size import parameter_count
from aer_megatron.costs.step import Candidate, fits_kv, step_flops
from aer_megatron.plan.search import Setting, evaluate, own_candidate, possible_layouts, token_budget

HEAD_FORMS: tuple[HeadForm, ...] = ("fused", "logits", "textbook")

_NAMES = ("", "micro-", "batch", "peak", "free", "tp", "cp", "pp", "dp", "sync", "rollout", "score", "train", "step")
_UNITS = ("seq", "tokens", "budget", *7 * ("GB",), *4 * ("s",))


def gigabytes(value: float) -> str:
    """Returns bytes as GB (10^9) with one decimal."""
    return f"{value / 1e9:,.1f}"


def report(setting: Setting, candidates: Sequence[Candidate], top: int) -> list[str]:
    """Returns the lines of the plan."""
    own, usable = own_candidate(setting), setting.usable_bytes
    rows = [(candidate, token_budget(setting, candidate.layout)) for candidate in candidates[:top]]
    heads = _head_bytes(setting, own)
    return [
        *_header(setting),
        *memory_lines(
            own,
            usable_bytes=usable,
            dtype=setting.plan.config.model.dtype,
            head_bytes=heads,
            beside=setting.plan.config.run.async_checkpoint,
        ),
        *layout_lines(rows, num_found=len(candidates), length=setting.plan.longest, usable_bytes=usable),
    ]


def _header(setting: Setting) -> list[str]:
    plan, work = setting.plan, setting.plan.work
    config, arch = plan.config, plan.arch
    layout = own_candidate(setting).layout
    form = setting.plan.training_form(layout)
    flops = step_flops(arch, work, layout, form)
    kv = kv_bytes_per_token(arch, form.dtype_bytes)
    lines = [
        f"model        {config.model.path}: {parameter_count(arch):,} parameters, {arch.num_layers} layers",
        f"hardware     {setting.num_gpus} x {setting.gpu.name}, {gigabytes(setting.gpu.memory_bytes)} GB each, "
        f"{gigabytes(setting.usable_bytes)} GB to plan with",
        f"step         {work.sequences} sequences of at most {work.prompt_tokens} + {work.response_tokens} tokens = "
        f"{work.tokens:,} tokens, {work.minibatches} optimizer step(s)",
        f"operations   update {flops.model / 1e15:,.1f} PFLOP (6 N D + attention), scoring {flops.score / 1e15:,.1f}, "
        f"rollout {flops.rollout / 1e15:,.1f}",
        f"KV cache     {kv / 1e3:,.1f} kB per token of the whole model",
    ]
    if setting.rollout_share:
        tp = int(config.sglang.launch.get("tp_size", 1))
        tokens = fits_kv(arch, form, setting.rollout_share * setting.gpu.memory_bytes, tp=tp)
        lines.append(
            f"servers      {setting.rollout_share:.0%} of every GPU, tp {tp}: room for {tokens:,} tokens of KV cache, "
            f"{tokens // setting.plan.longest} sequences at once"
        )
    return lines


def _head_bytes(setting: Setting, own: Candidate) -> dict[str, float]:
    """Returns what each form of the head would take in the run file's layout."""
    form, responses = (
        setting.plan.training_form(own.layout),
        own.micro_batch_size * setting.plan.config.rollout.max_new_tokens,
    )
    responses, rows_of_rank = -(-responses // own.layout.cp), form.vocab_rows // own.layout.tp
    return {
        head: head_memory(setting.plan.arch.hidden_size, rows_of_rank, responses, replace(form, head=head))
        for head in HEAD_FORMS
    }


def nothing_fits_text(setting: Setting) -> str:
    """Returns why no layout fits, with the remedies."""
    layouts, work = list(possible_layouts(setting)), setting.plan.work
    if not layouts:
        return (
            f"--gpus={setting.num_gpus}: no tp x pp x cp x dp of that many ranks divides the model and the batch of "
            f"{work.sequences // work.minibatches} sequences; choose --gpus or rollout.prompts_per_step with"
            " common divisors"
        )
    least = min((evaluate(setting, layout, 1) for layout in layouts), key=lambda candidate: candidate.peak_bytes)
    remedies = ["more GPUs", "a lower rollout.max_new_tokens"]
    if not setting.plan.config.rollout.uses_servers:
        remedies += ["a lower rollout.max_batch_size", "rollout.engine='sglang': embedded keeps the model on every GPU"]
    if setting.rollout_share:
        remedies.append("a lower --rollout-share")
    memory, gb = least.memory, gigabytes
    return (
        f"nothing fits {setting.num_gpus} x {setting.gpu.name}: the smallest layout, {least.layout.text} with "
        f"one sequence per micro-batch, needs {gb(least.peak_bytes)} of {gb(setting.usable_bytes)} GB per GPU "
        f"(weights {gb(memory.weights + least.engine.weights)}, gradients {gb(memory.gradients)}, "
        f"optimizer {gb(memory.optimizer)}, rollout {gb(least.engine.rollout)}); use {', '.join(remedies)}"
    )


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

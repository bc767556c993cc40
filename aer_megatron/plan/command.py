"""What a run needs before it runs: memory per GPU, work per step, and the layouts that fit.

    python -m aer_megatron.plan RUN.toml --gpus 8 --gpu h100
    python -m aer_megatron.plan RUN.toml --gpus 64 --rollout-share 0.4 --rollout.max_new_tokens=8192

Reads the run file and the model's config.json only; needs no weights, data or GPU. The formulas are in
costs/memory.py and costs/step.py, what they were checked against is in docs/evidence/plan.md.

Exit codes: 0 done, 2 the settings are impossible or nothing fits (one clear message).
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from aer_megatron.config import Config
from aer_megatron.config_loading import load_config, refuse_misspelt
from aer_megatron.console.failures import run_command
from aer_megatron.convert.architecture import ModelArchitecture, check_parallel, pad_query_groups, padded_vocab_size
from aer_megatron.convert.hf_config import architecture_from_hf_config
from aer_megatron.costs.hardware import GPUS, Gpu, gpu_named
from aer_megatron.costs.memory import (
    BatchShape,
    EngineMemory,
    HeadForm,
    TrainingForm,
    embedded_engine_memory,
    head_memory,
    kv_bytes_per_token,
    stage_memory,
)
from aer_megatron.costs.model_size import Layout, Recompute, parameter_count
from aer_megatron.costs.step import Candidate, Workload, fits_kv, step_flops, step_time, step_traffic
from aer_megatron.files.json_input import read_json_object
from aer_megatron.parallel import vocab_shard
from aer_megatron.plan.table import gigabytes, layout_lines, memory_lines

DTYPE_BYTES = {"fp32": 4, "bf16": 2}
MAX_CHUNKS = 4  # model chunks per pipeline rank that are tried: more of them send more and hide less
HEAD_FORMS: tuple[HeadForm, ...] = ("fused", "logits", "textbook")


@dataclass(frozen=True, slots=True)
class Setting:
    """What is asked for."""

    config: Config
    arch: ModelArchitecture
    gpu: Gpu
    num_gpus: int
    reserve: float  # share of a GPU's memory that is left to CUDA, NCCL and fragmentation
    rollout_share: float  # share that co-located rollout servers hold

    @property
    def usable_bytes(self) -> float:
        return self.gpu.memory_bytes * (1 - self.reserve)

    @property
    def length(self) -> int:
        return self.config.data.max_prompt_tokens + self.config.rollout.max_new_tokens

    @property
    def work(self) -> Workload:
        rollout = self.config.rollout
        return Workload(
            sequences=rollout.prompts_per_step * rollout.group_size,
            prompt_tokens=self.config.data.max_prompt_tokens,
            response_tokens=rollout.max_new_tokens,
            minibatches=self.config.algo.num_minibatches,
            passes=2 if self.config.algo.kl_coefficient else 1,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code; prints the plan, or one message on standard error."""
    options, overrides = _parser().parse_known_args(sys.argv[1:] if arguments is None else list(arguments))
    return run_command(lambda edge: _print_plan(options, overrides))


def _print_plan(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    setting = _setting(options, overrides)
    check_layout(setting)
    candidates = list(fitting_candidates(setting))
    print("\n".join(report(setting, candidates, options.top)))
    if not candidates:
        raise ValueError(_nothing_fits(setting))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m aer_megatron.plan", allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("run_file", help="run file (TOML); --section.key=value overrides it")
    parser.add_argument("--gpus", type=int, required=True, help="GPUs that train")
    parser.add_argument("--gpu", default="h100", help=f"kind of GPU: {', '.join(gpu.name for gpu in GPUS)}")
    parser.add_argument("--reserve", type=float, default=0.1, help="share of memory for CUDA, NCCL and fragmentation")
    parser.add_argument("--rollout-share", type=float, default=0.0,
                        help="share of each GPU's memory that co-located rollout servers hold")  # fmt: skip
    parser.add_argument("--top", type=int, default=8, help="layouts printed")
    return parser


def _setting(options: argparse.Namespace, overrides: Sequence[str]) -> Setting:
    refuse_misspelt(overrides)
    config = load_config(options.run_file, overrides)
    if options.gpus < 1:
        raise ValueError(f"--gpus={options.gpus} must be at least 1")
    for name, value in (("reserve", options.reserve), ("rollout-share", options.rollout_share)):
        if not 0 <= value < 1:
            raise ValueError(f"--{name}={value} must lie in [0, 1): it is a share of a GPU's memory")
    if options.rollout_share and config.rollout.engine == "embedded":
        raise ValueError(
            f"--rollout-share={options.rollout_share} is for rollout.engine='sglang'; set that, or drop the share"
        )
    file = Path(config.model.path) / "config.json"
    if not file.is_file():
        raise ValueError(f"model.path={config.model.path!r} has no config.json; a plan needs that file, but no weights")
    arch = architecture_from_hf_config(read_json_object(file))
    return Setting(config, arch, gpu_named(options.gpu), options.gpus, options.reserve, options.rollout_share)


def check_layout(setting: Setting) -> None:
    """Raises ValueError where the run file's own layout is impossible on these GPUs, naming the remedy."""
    config, arch = setting.config, setting.arch
    parallel = config.parallel
    config.check_world_size(setting.num_gpus)
    check_parallel(pad_query_groups(arch, parallel.tp), parallel.tp, parallel.pp, vpp=parallel.vpp, ep=parallel.ep)
    if arch.moe and parallel.tp > 1 and not parallel.sequence_parallel:
        raise ValueError(f"parallel.tp={parallel.tp} with experts needs parallel.sequence_parallel=true; set it")
    if setting.length > arch.max_positions:
        raise ValueError(
            f"data.max_prompt_tokens={config.data.max_prompt_tokens} + rollout.max_new_tokens="
            f"{config.rollout.max_new_tokens} = {setting.length} exceeds the model's {arch.max_positions} positions; "
            "lower one"
        )


def own_candidate(setting: Setting) -> Candidate:
    """Returns the run file's own layout and micro-batch size, whether they fit or not."""
    own = setting.config.parallel
    dp, recompute = setting.config.check_world_size(setting.num_gpus), _recompute(setting.config)
    layout = Layout(own.tp, own.pp, dp, own.ep, own.sequence_parallel, recompute, own.cp, own.vpp)
    packed = own.tokens_per_micro_batch // setting.length  # a packed micro-batch of the longest sequences
    return evaluate(setting, layout, packed or own.micro_batch_size)


def _recompute(config: Config) -> Recompute:
    value = config.megatron.get("recompute_granularity")
    if value not in (None, "selective", "full"):
        raise ValueError(f"megatron.recompute_granularity={value!r} is not 'selective' or 'full'; use one or drop it")
    return value or "none"


def possible_layouts(setting: Setting) -> Iterator[Layout]:
    """Yields the layouts that the model and the batch allow: tp inside a node, no padded heads."""
    config, arch, num_gpus = setting.config, setting.arch, setting.num_gpus
    for tp, pp, cp, ep in itertools.product(
        range(1, min(num_gpus, setting.gpu.gpus_per_node) + 1),
        range(1, min(num_gpus, arch.num_layers) + 1),
        _context_sizes(setting),
        range(1, min(num_gpus, arch.moe.num_experts if arch.moe else 1) + 1),
    ):
        if num_gpus % (tp * pp * cp) or num_gpus // (tp * pp) % ep:
            continue
        try:
            sizes = {"tp": tp, "pp": pp, "cp": cp, "ep": ep}
            dp = config.with_options({"parallel": sizes}).check_world_size(num_gpus)
        except ValueError:  # no multiple of it is a mini-batch: not a layout
            continue
        for vpp in sorted({*range(1, MAX_CHUNKS + 1), config.parallel.vpp}) if pp > 1 else (1,):
            try:
                check_parallel(arch, tp, pp, vpp=vpp, ep=ep)
            except ValueError:  # this one does not fit the model
                continue
            for sequence_parallel in (False, True) if tp > 1 and not arch.moe else (tp > 1,):
                yield Layout(tp, pp, dp, ep, sequence_parallel, "none", cp, vpp)
                yield Layout(tp, pp, dp, ep, sequence_parallel, "full", cp, vpp)


def _context_sizes(setting: Setting) -> list[int]:
    """Returns powers of two, and the run file's own, that leave each rank two chunks of the longest sequence."""
    powers = {1 << k for k in range(setting.num_gpus.bit_length())}
    return sorted(cp for cp in powers | {setting.config.parallel.cp} if cp == 1 or 2 * cp <= setting.length)


def fitting_candidates(setting: Setting) -> Iterator[Candidate]:
    """Yields the best candidate of every (tp, pp, cp, dp, ep) that fits, by estimated time, best first."""
    best: dict[tuple[int, ...], Candidate] = {}
    for layout in possible_layouts(setting):
        key = (layout.tp, layout.pp, layout.cp, layout.dp, layout.ep)
        for size in _micro_batch_sizes(setting, layout):
            candidate = evaluate(setting, layout, size)
            if candidate.peak_bytes > setting.usable_bytes:
                break
            if key not in best or candidate.time.total < best[key].time.total:
                best[key] = candidate
    yield from sorted(best.values(), key=lambda candidate: candidate.time.total)


def token_budget(setting: Setting, layout: Layout) -> int:
    """Returns the most tokens of a micro-batch that fit, in whole sequences of the longest length; 0 if none does."""
    fits, too_many = 0, setting.work.sequences // setting.work.minibatches // layout.dp + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if evaluate(setting, layout, middle).peak_bytes <= setting.usable_bytes:
            fits = middle
        else:
            too_many = middle
    return fits * setting.length


def _micro_batch_sizes(setting: Setting, layout: Layout) -> Iterator[int]:
    share = setting.work.sequences // setting.work.minibatches // layout.dp
    size = 1
    while size <= share:
        yield size
        size *= 2


def evaluate(setting: Setting, layout: Layout, micro_batch_size: int) -> Candidate:
    """Returns the cost of one layout."""
    config, arch = setting.config, pad_query_groups(setting.arch, layout.tp)
    form, work = training_form(setting, layout), setting.work
    multiple = math.lcm(2 * layout.cp if layout.cp > 1 else 1, layout.cp * layout.sequence_shards)
    length = -(-setting.length // multiple) * multiple
    batch = BatchShape(micro_batch_size, length, micro_batch_size * config.rollout.max_new_tokens)
    micro_batches = math.ceil(work.sequences / work.minibatches / layout.dp / micro_batch_size)
    stages = {
        stage: stage_memory(arch, layout, batch, form, stage=stage, num_micro_batches=micro_batches)
        for stage in {0, layout.pp - 1}
    }
    worst = max(stages, key=lambda stage: stages[stage].total)
    engine, together = _engine(setting, layout)
    return Candidate(
        layout=layout,
        micro_batch_size=micro_batch_size,
        stage=worst,
        memory=stages[worst],
        engine=engine,
        served=setting.rollout_share * setting.gpu.memory_bytes,
        traffic=step_traffic(arch, work, layout, form),
        time=step_time(arch, work, layout, form, setting.gpu, micro_tokens=batch.tokens // layout.cp, batch=together),
    )


def training_form(setting: Setting, layout: Layout) -> TrainingForm:
    """Returns the kernels and formats that the run has on a GPU."""
    model = setting.config.model
    return TrainingForm(
        dtype_bytes=DTYPE_BYTES[model.dtype],
        attention="flash",
        head=model.head,
        vocab_rows=padded_vocab_size(setting.arch.vocab_size, layout.tp, divisible_by=model.vocab_multiple),
        chunk_bytes=vocab_shard.DEVICE_CHUNK_BYTES,
        fused_swiglu=bool(setting.config.megatron.get("bias_activation_fusion")),
    )


def _engine(setting: Setting, layout: Layout) -> tuple[EngineMemory, int]:
    """Returns the embedded engine's memory and how many sequences it decodes together; nothing for servers."""
    config = setting.config
    if config.rollout.engine != "embedded":
        return EngineMemory(0, 0, 2 * config.parallel.weight_bucket_mb * 10**6), 0
    together = min(config.rollout.max_batch_size, math.ceil(setting.work.sequences / layout.num_ranks))
    memory = embedded_engine_memory(
        setting.arch,
        dtype_bytes=DTYPE_BYTES[config.model.dtype],
        batch=together,
        prompts=math.ceil(together / config.rollout.group_size),
        prompt_tokens=config.data.max_prompt_tokens,
        length=setting.length,
        bucket_bytes=config.parallel.weight_bucket_mb * 10**6,
    )
    return memory, together


def _nothing_fits(setting: Setting) -> str:
    layouts = list(possible_layouts(setting))
    if not layouts:
        return (
            f"--gpus={setting.num_gpus}: no tp x pp x cp x dp of that many ranks divides the model and the batch of "
            f"{setting.work.sequences // setting.work.minibatches} sequences; choose --gpus or rollout.prompts_per_step"
            " with common divisors"
        )
    least = min((evaluate(setting, layout, 1) for layout in layouts), key=lambda candidate: candidate.peak_bytes)
    remedies = ["more GPUs", "a lower rollout.max_new_tokens"]
    if setting.config.rollout.engine == "embedded":
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
            dtype=setting.config.model.dtype,
            head_bytes=heads,
            beside=setting.config.run.async_checkpoint,
        ),
        *layout_lines(rows, num_found=len(candidates), length=setting.length, usable_bytes=usable),
    ]


def _header(setting: Setting) -> list[str]:
    config, arch, work = setting.config, setting.arch, setting.work
    layout = own_candidate(setting).layout
    form = training_form(setting, layout)
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
            f"{tokens // setting.length} sequences at once"
        )
    return lines


def _head_bytes(setting: Setting, own: Candidate) -> dict[str, float]:
    """Returns what each form of the head would take in the run file's layout."""
    form, responses = training_form(setting, own.layout), own.micro_batch_size * setting.config.rollout.max_new_tokens
    responses, rows_of_rank = -(-responses // own.layout.cp), form.vocab_rows // own.layout.tp
    return {
        head: head_memory(setting.arch.hidden_size, rows_of_rank, responses, replace(form, head=head))
        for head in HEAD_FORMS
    }


if __name__ == "__main__":
    sys.exit(main())

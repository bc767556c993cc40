"""The run's configuration: the home of defaults (those of ``[algo]`` stand in algo/options.py).

A run file is TOML; dotted overrides come from the command line (``--algo.entropy.kind=none``); an unknown key is an
error that names the nearest known one (config_loading.py reads both). Every section is a frozen pydantic model.

``[megatron]`` passes through to Megatron-Core's TransformerConfig unchanged, ``[sglang.launch]`` to the servers.

This file does NOT touch torch or know ranks; of the environment it reads where ``~`` is.
"""

from __future__ import annotations

import itertools
import math
import os
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from aer_megatron.algo.options import MOVED_OPTIONS, AlgoSection
from aer_megatron.config_section import IMPORTABLE, Section

_SEED_LIMIT = 2**63  # torch, NumPy and the servers all take seeds below it


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be empty; give it, or leave the option out for its default")
    return text


def _expand_home(path: str | None) -> str | None:
    """Returns the path with a leading ``~`` or ``~user`` replaced: no shell does that in a run file."""
    expanded = os.path.expanduser(path or "")
    if expanded.startswith("~"):
        raise ValueError("names a home folder that this machine does not know; write the path in full (or ./~...)")
    return expanded if path else path


Text = Annotated[str, AfterValidator(_not_blank)]
PathText = Annotated[str, AfterValidator(_not_blank), AfterValidator(_expand_home)]
PathOrEmpty = Annotated[str, AfterValidator(_expand_home)]


def _optional_path(path: str | None) -> str | None:
    return path if path is None else _expand_home(_not_blank(path))


# the union inside: the field's type is then what the documentation prints
OptionalPath = Annotated[str | None, AfterValidator(_optional_path)]


class RunSection(Section):
    name: Text = Field("run", description="label of the run in reports")
    output_dir: PathText = Field("runs/run", description="folder that receives metrics, reports and checkpoints")
    seed: int = Field(0, ge=0, lt=_SEED_LIMIT, description="seeds data order, rollouts and initialisation")
    num_steps: int = Field(100, ge=1, description="policy updates' rollout batches")
    eval_every: int = Field(0, ge=0, description="evaluate every k steps (step 0 included); 0 = never")
    checkpoint_every: int = Field(0, ge=0, description="write a checkpoint every k steps; 0 = only at the end")
    keep_checkpoints: int = Field(2, ge=1, description="newest checkpoints kept")
    async_checkpoint: bool = Field(
        True, description="write checkpoints beside training, from a copy in host memory; false = training waits"
    )
    resume: bool = Field(True, description="continue from the newest checkpoint in output_dir, if there is one")
    max_hours: float = Field(
        0.0, ge=0, description="save and end in time, with exit code 0, when the next step would not fit; 0 = no limit"
    )
    hang_timeout_s: float = Field(
        1800.0, ge=0, description="a rank that stays longer in one phase or call ends the run, saying where; 0 = off"
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="an update whose loss or gradient is not finite ends the run, or is left out; never applied"
    )
    max_skipped_updates: int = Field(3, ge=0, description="updates left out in a row beyond which the run ends anyway")
    keep_reproducers: int = Field(
        2, ge=0, description="newest updates kept in output_dir/nonfinite for aer replay-batch; 0 = none"
    )
    reproducer_gb: float = Field(
        20.0, ge=0, description="weights of a kept update up to this size are kept with it, GB (10^9 bytes)"
    )
    record_batch: int = Field(-1, ge=-1, description="keep this step's batch in output_dir/recorded too; -1 = none")


class ModelSection(Section):
    path: PathText = Field(description="Hugging Face folder: config.json, tokenizer, *.safetensors")
    dtype: Literal["fp32", "bf16"] = Field("bf16", description="training precision of weights and activations")
    head: Literal["fused", "logits"] = Field(
        "fused", description="fused: logits never exist beyond a chunk of tokens; logits: the whole logits once"
    )
    vocab_multiple: int = Field(
        1, ge=1, description="each rank's vocabulary shard is padded to a multiple of this; 128 on GPUs"
    )


class ParallelSection(Section):
    tp: int = Field(1, ge=1, description="tensor-parallel size")
    pp: int = Field(1, ge=1, description="pipeline-parallel size")
    vpp: int = Field(1, ge=1, description="model chunks per pipeline rank (interleaved schedule); needs pp > 1")
    cp: int = Field(1, ge=1, description="context-parallel size: every sequence is cut over so many ranks")
    ep: int = Field(1, ge=1, description="expert-parallel size; divides the dp * cp ranks among the experts")
    sequence_parallel: bool = Field(False, description="shard norms and dropout along the sequence over tp")
    micro_batch_size: int = Field(1, ge=1, description="sequences per padded micro-batch and data-parallel rank")
    tokens_per_micro_batch: int = Field(
        0, ge=0, description="token budget of a packed micro-batch (its cp ranks share it); 0 = padded micro-batches"
    )
    weight_bucket_mb: int = Field(
        256, ge=1, description="weights are gathered for rollouts in buckets of about this many MB (10^6 bytes)"
    )

    def check(self, longest: int) -> None:
        """Raises ValueError where options exclude one another or ``longest`` tokens do not fit a micro-batch."""
        if self.sequence_parallel and self.tp == 1:
            raise ValueError("parallel.sequence_parallel=true needs parallel.tp > 1; set it to false")
        if self.vpp > 1 and self.pp == 1:
            raise ValueError(f"parallel.vpp={self.vpp} needs parallel.pp > 1, stages to interleave; set it to 1")
        shards = self.cp * (self.tp if self.sequence_parallel else 1)
        multiple = math.lcm(2 * self.cp if self.cp > 1 else 1, shards)
        needed = -(-longest // multiple) * multiple
        if 0 < self.tokens_per_micro_batch < needed:
            raise ValueError(
                f"parallel.tokens_per_micro_batch={self.tokens_per_micro_batch} must hold the longest sequence: "
                f"data.max_prompt_tokens + rollout.max_new_tokens = {longest} (padded: {needed}); set at least "
                f"{needed}, or 0 for padded micro-batches"
            )


class OptimizerSection(Section):
    lr: float = Field(1e-6, gt=0, description="peak learning rate of AdamW")
    warmup_steps: int = Field(0, ge=0, description="linear warm-up, in optimizer steps")
    decay: Literal["constant", "linear", "cosine"] = Field("constant", description="schedule after the warm-up")
    min_lr: float = Field(0.0, ge=0, description="learning rate at the end of a linear or cosine decay")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.98, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    clip_grad: float = Field(1.0, ge=0, description="global gradient-norm bound; 0 = no clipping")

    def check(self, name: str) -> None:
        """Raises ValueError where the decay of section ``name`` would raise the learning rate."""
        if self.decay != "constant" and self.min_lr > self.lr:
            raise ValueError(
                f"{name}.min_lr={self.min_lr:g} must be at most {name}.lr={self.lr:g}, from which the {self.decay} "
                f"decay starts; lower it, or set {name}.decay='constant'"
            )


class SourceSection(Section):
    """Where problems come from: exactly one of ``path`` and ``task``."""

    path: OptionalPath = Field(None, description='JSONL or Parquet file of {"problem"|"prompt", "answer", ...}')
    task: str | None = Field(None, min_length=1, description='procedural set: "countdown" or "reasoning_gym:NAME"')
    size: int = Field(10_000, ge=1, description="items of a procedural set")
    seed: int = Field(0, ge=0, lt=_SEED_LIMIT, description="seed of a procedural set")
    options: dict[str, Any] = Field(default_factory=dict, description="options of a procedural set")

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.path is None) == (self.task is None):
            raise ValueError("exactly one of path and task must be given: a file, or a procedural set")
        return self


class DataSection(Section):
    train: SourceSection
    eval: SourceSection | None = None
    template: Literal["plain", "chat"] = Field("chat", description="plain text, or the tokenizer's chat template")
    instruction: str = Field("{problem}", description="text put to the model; {problem} is replaced")
    system: str | None = Field(None, description="system message of the chat template")
    verifier: Text = Field("math", description="verifier of records that name none")
    verifiers: tuple[str, ...] = Field(
        (), strict=False, description='functions of yours, "package.module:function", that records may name as verifier'
    )
    max_prompt_tokens: int = Field(1024, ge=1, description="longer prompts are bad records")
    on_bad_record: Literal["error", "skip"] = "error"

    def check(self) -> None:
        """Raises ValueError where ``verifiers`` lists what is no function."""
        for name in self.verifiers:
            if IMPORTABLE.fullmatch(name) is None:
                raise ValueError(
                    f"data.verifiers={list(self.verifiers)}: {name!r} is not of the form 'package.module:function'; "
                    "built-in verifiers need not be listed"
                )


class RolloutSection(Section):
    engine: Literal["embedded", "sglang"] = Field(
        "embedded", description="embedded = in-process generation on every rank; sglang = the servers of [sglang]"
    )
    quantization: Literal["none", "fp8"] = Field(
        "none", description="fp8: the engine's weights are rounded to FP8, 128 x 128 values to a scale; docs/fp8.md"
    )
    prompts_per_step: int = Field(64, ge=1, description="P, prompts of a rollout batch over all ranks")
    group_size: int = Field(8, ge=1, description="G, rollouts per prompt")
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0 = off")
    max_new_tokens: int = Field(1024, ge=1)
    max_batch_size: int = Field(256, ge=1, description="sequences decoded together by the embedded engine")
    dynamic_sampling: bool = Field(False, description="drop groups solved always or never and sample more prompts")
    max_refills: int = Field(4, ge=0, description="extra rollout rounds that dynamic sampling may take in a step")
    oversample: float = Field(
        1.0, ge=1, description="launch this many times the groups needed; the first whole ones win, the rest is aborted"
    )
    staleness: int = Field(
        0, ge=0, description="policy versions that a token may be behind its training; 0 = generate, then train"
    )
    logprob_gate: float = Field(
        0.0, ge=0, description="stop at step 0 if the rollout/train log-probability difference exceeds this; 0 = off"
    )

    def check(self, tis_clip: float) -> None:
        """Raises ValueError where an option needs servers, or stale rollouts would be trained on uncorrected."""
        for name, value, off in (("staleness", self.staleness, 0), ("oversample", self.oversample, 1)):
            if value > off and self.engine != "sglang":
                raise ValueError(
                    f"rollout.{name}={value:g} needs rollout.engine='sglang', servers that generate by themselves; the "
                    f"embedded engine works in turn with the trainer: set rollout.{name}={off}"
                )
        if self.staleness and not tis_clip:
            raise ValueError(
                f"rollout.staleness={self.staleness} trains on tokens of older policies and algo.tis_clip=0 does not "
                "correct for them; set algo.tis_clip (usual: 2)"
            )


class SglangSection(Section):
    """SGLang servers, for ``rollout.engine = "sglang"``: those of ``urls``, or ``num_servers`` launched by the run."""

    urls: tuple[str, ...] = Field((), strict=False, description="servers that run already, http://host:port")
    num_servers: int = Field(0, ge=0, description="servers that rank 0 launches and supervises; 0 = use urls")
    python: PathOrEmpty = Field("", description="interpreter of the servers' environment; empty = the trainer's own")
    host: Text = Field("127.0.0.1", description="address that launched servers listen on")
    launch: dict[str, Any] = Field(
        default_factory=dict, description="options of launched servers, passed on: mem_fraction_static = 0.8, ..."
    )
    environment: dict[str, str] = Field(default_factory=dict, description="variables added to launched servers'")
    router_url: str = Field("", description="smg in front of these servers, for generation requests; empty = none")
    api_key_env: str = Field(
        "",
        description="name of the environment variable that holds the servers' API key; "
        "empty = none, and a random one for launched servers",
    )
    transport: Text = Field(
        "disk",
        description="disk = a folder that trainer and servers share; distributed = broadcast by gloo or NCCL; "
        "tensor = servers on rank 0's machine: CUDA IPC, on CPU inside the request",
    )
    trainer_address: Text = Field("127.0.0.1", description="rank 0 as the servers reach it, for transport=distributed")
    bucket_mb: int = Field(64, ge=1, description="one broadcast or request of distributed or tensor, MB (10^6 bytes)")
    release_memory: bool = Field(False, description="servers on the trainer's GPUs free their memory while it trains")
    transfer_dir: PathOrEmpty = Field(
        "", description="the disk transport makes a folder of its own in it; empty = weights/ under run.output_dir"
    )
    max_concurrency: int = Field(64, ge=1, description="requests under way per server and training rank")
    request_timeout_s: float = Field(600.0, gt=0, description="a generation that takes longer is given up")
    connect_timeout_s: float = Field(5.0, gt=0)
    control_timeout_s: float = Field(30.0, gt=0, description="health, version and other short calls")
    transfer_timeout_s: float = Field(600.0, gt=0, description="each call of a weight transfer")
    start_timeout_s: float = Field(600.0, gt=0, description="from the launch of a server until it is ready")
    recovery_timeout_s: float = Field(600.0, gt=0, description="how long a step waits when no server is in service")
    probe_interval_s: float = Field(1.0, gt=0, description="how often unreachable servers are asked if they are back")
    max_attempts: int = Field(6, ge=1, description="tries of one request, over all servers")
    max_failures: int = Field(3, ge=1, description="failed calls in a row that take a server out of service")
    max_restarts: int = Field(10, ge=0, description="restarts of one launched server")

    def check(self) -> None:
        """Raises ValueError unless it says where the servers are."""
        if bool(self.urls) == bool(self.num_servers):
            raise ValueError(
                f"sglang.urls={list(self.urls)} and sglang.num_servers={self.num_servers}: rollout.engine='sglang' "
                "needs exactly one of them; name running servers in urls, or set num_servers to launch some"
            )
        if self.launch.get("grammar_backend") == "outlines":
            raise ValueError(
                "sglang.launch.grammar_backend='outlines' reads pickles from a cache folder (diskcache, "
                "CVE-2025-69872) and no request of a run has a grammar; leave it out"
            )


class RewardSection(Section):
    num_workers: int = Field(1, ge=1, description="verifier processes per rank")
    timeout_s: float = Field(5.0, gt=0, description="hard limit for one answer; the worker is killed beyond it")
    memory_mb: int = Field(
        4096, ge=0, description="MiB of address space of a verifier process beyond its loaded verifiers; 0: unbounded"
    )


class EvalSection(Section):
    num_prompts: int = Field(64, ge=1, description="prompts of the evaluation set")
    num_samples: int = Field(32, ge=1, description="samples per prompt, for the unbiased pass@k")
    k: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (1, 8, 32), strict=False, min_length=1, description="pass@k reported"
    )
    temperature: float = Field(1.0, gt=0)


class SftSection(Section):
    """The supervised stage: ``--stage=sft`` trains the model of ``sft.init`` and writes ``model.path``."""

    init: OptionalPath = Field(
        None, description="Hugging Face folder to start from; without *.safetensors: random weights by run.seed"
    )
    source: SourceSection | None = Field(None, description="problems with a response, or a task that can solve itself")
    num_steps: int = Field(1000, ge=1)
    batch_size: int = Field(64, ge=1, description="sequences per optimizer step over all ranks")
    optimizer: OptimizerSection = OptimizerSection(lr=1e-3, warmup_steps=50, decay="cosine")


class ReportSection(Section):
    progress: bool = Field(True, description="live display on rank 0")
    tensorboard: bool = True
    picture: bool = Field(True, description="write report.png at the end")
    flight_recorder: bool = Field(True, description="write flight.jsonl, from which controllers can be replayed")


class Config(Section):
    """A whole run."""

    moved = MOVED_OPTIONS

    run: RunSection = RunSection()
    model: ModelSection
    parallel: ParallelSection = ParallelSection()
    megatron: dict[str, Any] = Field(default_factory=dict, description="passed to Megatron-Core's TransformerConfig")
    optimizer: OptimizerSection = OptimizerSection()
    data: DataSection
    rollout: RolloutSection = RolloutSection()
    sglang: SglangSection = SglangSection()
    rewards: RewardSection = RewardSection()
    algo: AlgoSection = AlgoSection()
    eval: EvalSection = EvalSection()
    sft: SftSection = SftSection()
    report: ReportSection = ReportSection()

    @model_validator(mode="after")
    def _cross_checks(self) -> Self:
        sequences = self.rollout.prompts_per_step * self.rollout.group_size
        if sequences % self.algo.num_minibatches:
            raise ValueError(
                f"algo.num_minibatches={self.algo.num_minibatches} must divide rollout.prompts_per_step * "
                f"rollout.group_size = {sequences}; use one of {_divisors(sequences)}"
            )
        self.optimizer.check("optimizer")
        self.sft.optimizer.check("sft.optimizer")
        self.data.check()
        self.parallel.check(self.data.max_prompt_tokens + self.rollout.max_new_tokens)
        if max(self.eval.k) > self.eval.num_samples:
            raise ValueError(
                f"eval.k={list(self.eval.k)} asks for pass@{max(self.eval.k)} from eval.num_samples="
                f"{self.eval.num_samples} samples; raise eval.num_samples or drop that k"
            )
        if self.run.eval_every and self.data.eval is None:
            raise ValueError(f"run.eval_every={self.run.eval_every} needs a [data.eval] source; add one or set 0")
        self.algo.check(self.rollout.group_size, self.rollout.max_new_tokens)
        self.rollout.check(self.algo.tis_clip)
        if self.rollout.engine == "sglang":
            self.sglang.check()
        return self

    def check_world_size(self, world_size: int) -> int:
        """Returns the data-parallel size of ``world_size`` ranks.

        Raises:
            ValueError: if the sizes do not fit, naming the options and the remedy.
        """
        tp, pp, cp = self.parallel.tp, self.parallel.pp, self.parallel.cp
        model_parallel = tp * pp * cp
        if world_size % model_parallel:
            product = f"parallel.tp={tp} * parallel.pp={pp}" + (f" * parallel.cp={cp}" if cp > 1 else "")
            raise ValueError(
                f"{product} = {model_parallel} must divide the number of ranks {world_size}; launch a multiple of "
                f"{model_parallel} ranks or lower tp/pp{'/cp' if cp > 1 else ''}"
            )
        dp = world_size // model_parallel
        if dp * cp % self.parallel.ep:
            size = f"data-parallel size {dp}" if cp == 1 else f"dp * cp = {dp} * {cp} ranks"
            raise ValueError(
                f"parallel.ep={self.parallel.ep} must divide the {size} = {world_size} ranks / "
                f"(tp * pp = {tp * pp}); use one of {_divisors(dp * cp)}"
            )
        per_step = self.rollout.prompts_per_step * self.rollout.group_size // self.algo.num_minibatches
        if per_step % dp:
            raise ValueError(
                f"a mini-batch of {per_step} sequences must be a multiple of the data-parallel size {dp}; change "
                "rollout.prompts_per_step, rollout.group_size or algo.num_minibatches"
            )
        return dp


def _divisors(number: int) -> list[int]:
    """Returns the smallest divisors, at most eight, found in bounded time."""
    candidates = range(1, min(number, 10_000) + 1)
    return list(itertools.islice((d for d in candidates if number % d == 0), 8))

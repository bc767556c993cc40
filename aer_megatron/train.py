"""The command line and the composition root: the only place that chooses implementations.

    torchrun --nproc-per-node 2 -m aer_megatron.train RUN.toml --parallel.tp=2 --algo.entropy.kind=aer
    python -m aer_megatron.train RUN.toml --dry-run
    torchrun --nproc-per-node 2 -m aer_megatron.train RUN.toml --stage=sft

Exit codes: 0 done, 2 configuration or data are wrong (one clear message), anything else a failure while running.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aer_megatron.config import Config, config_digest, describe_options, load_config

if TYPE_CHECKING:
    from aer_megatron.actor.actor import Actor
    from aer_megatron.parallel.platform import Platform
    from aer_megatron.parallel.topology import Topology
    from aer_megatron.parallel.watchdog import Watchdog
    from aer_megatron.rollout.engine import RolloutEngine
    from aer_megatron.rollout.fleet import ServerFleet
    from aer_megatron.rollout.server import LaunchOptions
    from aer_megatron.sync.servers import ServerSync, SyncContext
    from aer_megatron.trainer import Progress, WeightSync

VERSIONED_PACKAGES = (
    "aer-megatron",
    "torch",
    "megatron-core",
    "transformers",
    "transformer-engine",
    "numpy",
    "math-verify",
    "reasoning-gym",
)
STAGE_FILE = "aer_stage.json"
MAX_SHARD_BYTES = 5 * 10**9
SERVER_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")

USAGE = """\
usage: python -m aer_megatron.train RUN.toml [--stage=rl|sft] [--dry-run] [--section.key=value ...]
       torchrun --nproc-per-node N -m aer_megatron.train RUN.toml ...

  RUN.toml             run file; every option below can be set in it or overridden with --section.key=value
  --stage=rl           reinforcement learning (the default)
  --stage=sft          supervised stage: trains the model of sft.init and writes model.path
  --dry-run            print the resolved configuration and the plan of one step, then stop
  --help               this text
"""


@dataclasses.dataclass(frozen=True, slots=True)
class CommandLine:
    """What the user asked for. Example: ``CommandLine("run.toml", "rl", False, ("--run.seed=1",))``."""

    run_file: str | None
    stage: str
    dry_run: bool
    overrides: tuple[str, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code of one training process."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or "--help" in arguments or "-h" in arguments:
        print(help_text())
        return 0
    _quiet_libraries()
    try:
        command = parse_command_line(arguments)
        config = load_config(command.run_file, command.overrides)
        if command.dry_run:
            print(plan_text(config))
            return 0
        run_stage(command.stage, config, arguments)
    except ValueError as error:
        if logging.getLogger("aer_megatron").isEnabledFor(logging.DEBUG):
            raise
        print(f"aer_megatron: {error}", file=sys.stderr)
        return 2
    return 0


def parse_command_line(arguments: Sequence[str]) -> CommandLine:
    """Returns the parsed arguments; raises ValueError for one that is not understood."""
    run_file, stage, dry_run, overrides = None, "rl", False, []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--dry-run":
            dry_run = True
        elif argument == "--stage" or argument.startswith("--stage="):
            stage = argument.partition("=")[2] if "=" in argument else next(rest, "")
            if stage not in ("rl", "sft"):
                raise ValueError(f"--stage={stage} is not a stage; use rl or sft")
        elif argument.startswith("--"):
            overrides.append(argument)
        elif run_file is None:
            run_file = argument
        else:
            raise ValueError(f"argument {argument!r} is not understood: the run file is already {run_file}")
    return CommandLine(run_file, stage, dry_run, tuple(overrides))


def help_text() -> str:
    """Returns the usage with every option, its default and its meaning."""
    lines = [USAGE, "options (defaults in brackets):"]
    for key, _, default, description in describe_options():
        lines.append(f"  --{key} [{default}]" + (f"\n        {description}" if description else ""))
    return "\n".join(lines)


def plan_text(config: Config) -> str:
    """Returns the resolved configuration and the sizes of one step.

    Raises:
        ValueError: the parallel sizes do not fit the ranks or the model.
    """
    from aer_megatron.parallel.platform import read_ranks

    _, world_size, _ = read_ranks()
    model_parallel = config.parallel.tp * config.parallel.pp
    num_ranks = world_size if world_size > 1 else model_parallel * config.parallel.ep
    dp = config.check_world_size(num_ranks)
    arch = _architecture(config.model.path)
    num_sequences = config.rollout.prompts_per_step * config.rollout.group_size
    per_update = num_sequences // config.algo.num_minibatches
    micro = -(-per_update // dp // config.parallel.micro_batch_size)
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    lines = [
        config.model_dump_json(indent=2),
        "",
        "plan of one step",
        f"  ranks                {num_ranks} = tp {config.parallel.tp} x pp {config.parallel.pp} x dp {dp}",
        f"  model                {arch.family}, {arch.num_layers} layers, hidden {arch.hidden_size}, "
        f"vocabulary {arch.vocab_size}",
        f"  rollouts             {config.rollout.prompts_per_step} prompts x {config.rollout.group_size} = "
        f"{num_sequences} sequences",
        f"  response tokens      <= {num_sequences * config.rollout.max_new_tokens:,}",
        f"  optimizer steps      {config.algo.num_minibatches} of {per_update} sequences",
        f"  micro-batches        {micro} per optimizer step and rank, of <= {config.parallel.micro_batch_size} "
        "sequences",
        f"  tokens, micro-batch  <= {config.parallel.micro_batch_size * longest:,}",
    ]
    return "\n".join(lines)


def run_stage(stage: str, config: Config, arguments: Sequence[str]) -> None:
    """Returns when the stage is done; every rank calls it."""
    from aer_megatron.parallel import platform as platforms
    from aer_megatron.parallel.topology import destroy_topology

    platform = platforms.install_platform()
    config.check_world_size(platform.world_size)
    # torch's own limit is the second line: it must not fire before the watchdog has spoken
    platforms.initialize_process_group(platform, timeout_s=60.0 + 1.5 * (config.run.hang_timeout_s or 600.0))
    try:
        with _open_watchdog(config, platform) as watchdog:
            if stage == "sft":
                # the supervised stage replaces model.path, so the model is read from sft.init
                _check_model(config, _init_path(config))
                if not _is_made(config):
                    topology = _topology(config)
                    _run_sft(config, platform, topology, arguments, watchdog)
                elif platform.rank == 0:
                    print(f"{config.model.path}: made earlier by the same configuration; nothing to do")
            else:
                _check_model(config, config.model.path)
                topology = _topology(config)
                _run_rl(config, platform, topology, arguments, watchdog)
    finally:
        destroy_topology()


def _open_watchdog(config: Config, platform: Platform) -> Watchdog:
    from aer_megatron.parallel.watchdog import Watchdog, distributed_store

    def advice() -> str:
        folder = Path(config.run.output_dir) / "checkpoints"
        newest = max((path for path in folder.glob("step_*") if path.name[5:].isdigit()), default=None)
        resume = f"the newest is {newest}, from which the same command goes on" if newest else "there is none yet"
        return f"no checkpoint can be made now: {resume}"

    return Watchdog(
        rank=platform.rank,
        timeout_s=config.run.hang_timeout_s,
        say=functools.partial(print, file=sys.stderr, flush=True),
        store=distributed_store(),
        advice=advice,
    )


def _topology(config: Config) -> Topology:
    from aer_megatron.parallel.topology import initialize_topology

    parallel = config.parallel
    return initialize_topology(tp=parallel.tp, pp=parallel.pp, ep=parallel.ep, seed=config.run.seed)


def _run_rl(
    config: Config, platform: Platform, topology: Topology, arguments: Sequence[str], watchdog: Watchdog
) -> None:
    from aer_megatron._C import DifficultyLedger
    from aer_megatron.actor.checkpoint import CheckpointStore
    from aer_megatron.algo import controller
    from aer_megatron.data.prompts import PromptCursor
    from aer_megatron.report.timer import PhaseTimer
    from aer_megatron.trainer import Parts, Progress, Trainer

    actor = _build_actor(
        config,
        config.model.path,
        platform,
        topology,
        optimizer=config.optimizer,
        num_updates=config.run.num_steps * config.algo.num_minibatches,
    )
    data = _load_data(config)
    cursor = PromptCursor(data.train, config.run.seed)
    ledger = DifficultyLedger(config.algo.ledger.decay, len(data.train))
    store = CheckpointStore(
        Path(config.run.output_dir) / "checkpoints",
        topology=topology,
        device=platform.device,
        keep=config.run.keep_checkpoints,
    )
    start = Progress(0, 0, controller.initial_state(config.algo.entropy), cursor.state_dict())
    checkpoint = store.latest()
    if checkpoint is not None and not config.run.resume:
        raise ValueError(
            f"run.resume=false, but run.output_dir={config.run.output_dir!r} holds checkpoints up to step "
            f"{checkpoint.step}; remove them, choose another run.output_dir, or set run.resume=true"
        )
    if checkpoint is not None:
        start = _progress_from(store.load(checkpoint, actor))
        cursor.load_state_dict(start.cursor)
        ledger = DifficultyLedger.load(str(checkpoint.path_of("ledger")))
    else:
        actor.load_hf_weights(_checked_weights(config.model.path))
    if config.algo.kl_coefficient:  # also on resume: the reference is the policy that the run began with
        actor.hold_reference(_checked_weights(config.model.path))

    def save(progress: Progress) -> None:
        store.save(
            actor,
            step=progress.next_step,
            state=_progress_table(progress),
            files={"ledger": lambda path: ledger.save(str(path))},
        )

    timer = PhaseTimer(on_phase=watchdog.enter_phase, first_step=start.next_step)
    with ExitStack() as stack:
        reporter = stack.enter_context(_open_reporter(config, platform, start.next_step, arguments))
        flight = _open_flight_recorder(config, platform, start.next_step)
        parts = _rollout_parts(config, platform, data, stack) | {
            "prompts": cursor,
            "policy": actor,
            "ledger": ledger,
            "save": save,
            "flight": flight,
            "reporter": reporter,
            "timer": timer,
        }
        Trainer(config, Parts(**parts), start).run()


def _run_sft(
    config: Config, platform: Platform, topology: Topology, arguments: Sequence[str], watchdog: Watchdog
) -> None:
    from aer_megatron.convert.random_weights import random_hf_weights
    from aer_megatron.data.supervised import SupervisedSource
    from aer_megatron.data.tokenizer import load_tokenizer, stop_token_ids
    from aer_megatron.report.timer import PhaseTimer
    from aer_megatron.trainer_sft import run_supervised

    init, options = _init_path(config), config.sft
    if options.source is None:
        raise ValueError("--stage=sft needs a [sft.source] table: a file with responses, or task = \"countdown\"")
    if options.batch_size % topology.dp:
        raise ValueError(
            f"sft.batch_size={options.batch_size} must be a multiple of the data-parallel size {topology.dp}; "
            f"use {-(-options.batch_size // topology.dp) * topology.dp}"
        )
    tokenizer = load_tokenizer(init)
    source = SupervisedSource(
        options.source,
        config.data,
        tokenizer,
        eos_id=stop_token_ids(init, tokenizer)[0],
        batch_size=options.batch_size,
        seed=config.run.seed,
    )
    actor = _build_actor(
        config, init, platform, topology, optimizer=options.optimizer, num_updates=options.num_steps
    )
    actor.load_hf_weights(_checked_weights(init) if _has_weights(init) else random_hf_weights(init, config.run.seed))
    folder = Path(config.run.output_dir) / "sft"
    sft_config = config.model_copy(
        update={
            "run": config.run.model_copy(
                update={"output_dir": str(folder), "name": f"{config.run.name} (sft)", "num_steps": options.num_steps}
            ),
            "report": config.report.model_copy(update={"picture": False}),
        }
    )
    with _open_reporter(sft_config, platform, 0, arguments) as reporter:
        timer = PhaseTimer(on_phase=watchdog.enter_phase)
        run_supervised(actor, source.batch, num_steps=options.num_steps, reporter=reporter, timer=timer)
    _write_policy(config, actor, init, platform)


def _write_policy(config: Config, actor: Actor, init: str, platform: Platform) -> None:
    """Writes model.path from the actor; a folder that an earlier supervised stage made is replaced."""
    from aer_megatron.convert.hf_folder import HFFolder, write_hf_folder
    from aer_megatron.parallel.exchange import barrier

    target = Path(config.model.path)
    weights: Iterator[tuple[str, Any]] = actor.hf_weights()
    if platform.rank == 0:
        if (target / STAGE_FILE).is_file():
            shutil.rmtree(target)
        hf_config = json.loads((Path(init) / "config.json").read_text(encoding="utf-8"))
        write_hf_folder(
            target,
            weights,
            config=hf_config,
            extra_files_from=init,
            max_shard_bytes=MAX_SHARD_BYTES,
            dtype=None,
        )
        HFFolder(target)  # reads back what was written
        (target / STAGE_FILE).write_text(json.dumps({"digest": _stage_digest(config)}) + "\n", encoding="utf-8")
    else:
        for _ in weights:
            pass
    barrier()


@dataclasses.dataclass(frozen=True, slots=True)
class Data:
    """Prompt sets and the tokenizer's functions."""

    train: Any
    evaluation: Sequence[Any]
    decode: Callable[[Sequence[int]], str]
    stop_ids: tuple[int, ...]


def _load_data(config: Config) -> Data:
    from aer_megatron.data.prompts import PromptSet
    from aer_megatron.data.sources import load_records
    from aer_megatron.data.tokenizer import load_tokenizer, make_decoder, stop_token_ids
    from aer_megatron.rewards.registry import check_verifiers

    tokenizer = load_tokenizer(config.model.path)
    stop_ids = stop_token_ids(config.model.path, tokenizer)
    read = functools.partial(
        load_records, on_bad_record=config.data.on_bad_record, default_verifier=config.data.verifier
    )
    train = PromptSet(read(config.data.train).records, tokenizer, config.data)
    evaluation: Sequence[Any] = ()
    if config.data.eval is not None:
        evaluation = PromptSet(read(config.data.eval).records, tokenizer, config.data)[: config.eval.num_prompts]
    check_verifiers(train.verifiers | {prompt.verifier for prompt in evaluation})
    return Data(train, evaluation, make_decoder(tokenizer, stop_ids), stop_ids)


def _rollout_parts(config: Config, platform: Platform, data: Data, stack: ExitStack) -> dict[str, Any]:
    """Returns collectors, verifier pool and weight sync around the engine; ``stack`` closes them."""
    from aer_megatron.parallel.gather import gather_counts, gather_experience
    from aer_megatron.rewards.pool import VerifierPool
    from aer_megatron.rewards.scoring import reason_counts, score_groups
    from aer_megatron.rollout.collect import RolloutCollector
    from aer_megatron.rollout.engine import SamplingOptions
    from aer_megatron.rollout.seeds import stream_seed

    rollout = config.rollout
    engine, weight_sync = (_sglang_engine if rollout.engine == "sglang" else _embedded_engine)(config, platform, stack)
    pool = stack.enter_context(VerifierPool(config.rewards.num_workers, config.rewards.timeout_s))

    def collector(num_samples: int, temperature: float, stream: str) -> RolloutCollector:
        return RolloutCollector(
            engine,
            SamplingOptions(temperature, rollout.top_p, rollout.top_k, frozenset(data.stop_ids)),
            num_samples=num_samples,
            max_new_tokens=rollout.max_new_tokens,
            stream_seed=stream_seed(config.run.seed, stream),
            rank=platform.rank,
            world_size=platform.world_size,
        )

    def gather(scored: list[Any]) -> tuple[Any, dict[str, int]]:
        experience = gather_experience(scored, device=platform.device)
        return experience, gather_counts(reason_counts(scored), device=platform.device)

    return {
        "collector": collector(rollout.group_size, rollout.temperature, "train"),
        "eval_collector": collector(config.eval.num_samples, config.eval.temperature, "eval"),
        "eval_prompts": data.evaluation,
        "score_groups": functools.partial(score_groups, decode=data.decode, pool=pool),
        "gather": gather,
        "weight_sync": weight_sync,
    }


def _embedded_engine(config: Config, platform: Platform, stack: ExitStack) -> tuple[RolloutEngine, WeightSync]:
    from transformers import AutoConfig

    from aer_megatron.actor.model import TORCH_DTYPES
    from aer_megatron.rollout.embedded import EmbeddedEngine
    from aer_megatron.sync.checksum import tensor_checksum
    from aer_megatron.sync.in_process import InProcessSync

    engine = EmbeddedEngine(
        AutoConfig.from_pretrained(config.model.path),
        dtype=TORCH_DTYPES[config.model.dtype],
        device=platform.device,
        max_batch_size=config.rollout.max_batch_size,
        checksum=tensor_checksum,
    )
    stack.callback(engine.close)
    return engine, InProcessSync(engine, checksum=tensor_checksum)


def _sglang_engine(config: Config, platform: Platform, stack: ExitStack) -> tuple[RolloutEngine, WeightSync]:
    """Returns engine and weight transport over the servers, which rank 0 launches where the run file says so."""
    from aer_megatron.parallel.agreement import exchange_json, on_first_rank
    from aer_megatron.rollout.fleet import FleetOptions, ServerFleet
    from aer_megatron.rollout.server import ServerGroup, command_line
    from aer_megatron.rollout.sglang import RequestLimits, SGLangEngine
    from aer_megatron.rollout.sglang_protocol import unverified_label, version_label
    from aer_megatron.sync.servers import Labels, SyncContext

    options = config.sglang
    group: ServerGroup | None = None
    urls = list(options.urls)
    if options.num_servers:
        if platform.rank == 0:
            group = stack.enter_context(
                ServerGroup(options.num_servers, _launch_options(config), command=command_line)
            )
        urls = on_first_rank(lambda: group and group.start(), rank=platform.rank, device=platform.device)
    fleet = stack.enter_context(
        ServerFleet(
            urls,
            FleetOptions(
                max_concurrency=options.max_concurrency,
                connect_timeout_s=options.connect_timeout_s,
                control_timeout_s=options.control_timeout_s,
                api_key=_api_key(config),
            ),
        )
    )
    context = SyncContext(
        arch=_architecture(config.model.path),
        labels=Labels(version_label, unverified_label),
        timeout_s=options.transfer_timeout_s,
        leads=platform.rank == 0,
        exchange=functools.partial(exchange_json, device=platform.device),
        replace=group.replace if group else lambda index: None,
    )
    sync = _server_sync(config, platform, fleet, context)
    stack.callback(sync.close)
    if group:
        group.watch(restore=sync.restore, renewed=fleet.renew)
    limits = RequestLimits(
        request_timeout_s=options.request_timeout_s,
        max_attempts=options.max_attempts,
        max_failures=options.max_failures,
        recovery_timeout_s=options.recovery_timeout_s,
        probe_interval_s=options.probe_interval_s,
    )
    return SGLangEngine(fleet, limits, transfer=sync.transfer), sync


def _server_sync(config: Config, platform: Platform, fleet: ServerFleet, context: SyncContext) -> ServerSync:
    from aer_megatron.sync.disk import DiskSync
    from aer_megatron.sync.distributed import DistributedSync

    options = config.sglang
    if options.transport == "distributed":
        return DistributedSync(
            fleet,
            context,
            backend=platform.backend,
            address=options.trainer_address,
            bucket_bytes=options.bucket_mb * 10**6,
        )
    return DiskSync(
        fleet,
        context,
        folder=Path(options.transfer_dir or Path(config.run.output_dir) / "weights"),
        hf_config=json.loads((Path(config.model.path) / "config.json").read_text(encoding="utf-8")),
        max_shard_bytes=MAX_SHARD_BYTES,
    )


def _launch_options(config: Config) -> LaunchOptions:
    from aer_megatron.rollout.server import LaunchOptions

    options, api_key = config.sglang, _api_key(config)
    # a server is no rank of this job
    environment = {name: value for name, value in os.environ.items() if not name.startswith(TORCHRUN_VARIABLES)}
    return LaunchOptions(
        python=options.python or sys.executable,
        model_path=str(Path(config.model.path).absolute()),
        host=options.host,
        arguments={"dtype": SERVER_DTYPES[config.model.dtype]}
        | options.launch
        | ({"api_key": api_key} if api_key else {}),
        environment=environment | options.environment,
        log_folder=Path(config.run.output_dir) / "sglang",
        start_timeout_s=options.start_timeout_s,
        max_restarts=options.max_restarts,
    )


def _api_key(config: Config) -> str | None:
    name = config.sglang.api_key_env
    if name and not os.environ.get(name):
        raise ValueError(f"sglang.api_key_env={name!r} is not set in the environment; export it, or leave this empty")
    return os.environ[name] if name else None


def _build_actor(
    config: Config, path: str, platform: Platform, topology: Topology, *, optimizer: Any, num_updates: int
) -> Actor:
    from aer_megatron.actor.actor import Actor

    return Actor(
        _architecture(path, tp=config.parallel.tp),
        config,
        topology,
        device=platform.device,
        optimizer=optimizer,
        num_updates_planned=num_updates,
    )


def _architecture(path: str, tp: int = 1) -> Any:
    """Returns the architecture of a Hugging Face folder, with zero query groups where tp does not divide the heads."""
    from aer_megatron.convert.architecture import architecture_from_hf_config, pad_query_groups

    file = Path(path) / "config.json"
    if not file.is_file():
        raise ValueError(f"model folder {path!r} has no config.json; give a Hugging Face folder (model.path, sft.init)")
    return pad_query_groups(architecture_from_hf_config(json.loads(file.read_text(encoding="utf-8"))), tp)


def _check_model(config: Config, path: str) -> None:
    from aer_megatron.convert.architecture import check_parallel

    arch = _architecture(path, tp=config.parallel.tp)
    check_parallel(arch, config.parallel.tp, config.parallel.pp, ep=config.parallel.ep)
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    if longest > arch.max_positions:
        raise ValueError(
            f"data.max_prompt_tokens={config.data.max_prompt_tokens} + rollout.max_new_tokens="
            f"{config.rollout.max_new_tokens} = {longest} exceeds the model's {arch.max_positions} positions; lower one"
        )


def _open_reporter(config: Config, platform: Platform, start_step: int, arguments: Sequence[str]) -> Any:
    from aer_megatron.report.reporter import NullReporter, Reporter
    from aer_megatron.report.writer import package_versions, write_run_manifest

    if platform.rank != 0:
        return NullReporter()
    write_run_manifest(
        config.run.output_dir,
        config,
        package_versions(VERSIONED_PACKAGES),
        command=["aer_megatron.train", *arguments],
        num_ranks=platform.world_size,
    )
    return Reporter.open(
        config, folder=config.run.output_dir, num_steps=config.run.num_steps, start_step=start_step
    )


def _open_flight_recorder(config: Config, platform: Platform, start_step: int) -> Any:
    """Returns rank 0's recorder, None elsewhere; records beyond the resume step go, also with the recorder off."""
    from aer_megatron.report.flight import FlightWriter

    if platform.rank != 0:
        return None
    writer = FlightWriter(config.run.output_dir)
    writer.truncate_from(start_step)
    return writer if config.report.flight_recorder else None


def _progress_table(progress: Progress) -> dict[str, Any]:
    from aer_megatron.algo.controller import state_to_dict

    return {
        "next_step": progress.next_step,
        "policy_version": progress.policy_version,
        "controller": state_to_dict(progress.controller_state),
        "cursor": dict(progress.cursor),
    }


def _progress_from(table: Mapping[str, Any]) -> Progress:
    from aer_megatron.algo.controller import state_from_dict
    from aer_megatron.trainer import Progress

    return Progress(
        next_step=table["next_step"],
        policy_version=table["policy_version"],
        controller_state=state_from_dict(table["controller"]),
        cursor=table["cursor"],
    )


def _init_path(config: Config) -> str:
    if config.sft.init is None:
        raise ValueError("--stage=sft needs sft.init: the Hugging Face folder to start from")
    return config.sft.init


def _checked_weights(path: str) -> Callable[[str], Any]:
    """Returns the getter of a Hugging Face folder whose tensors are exactly those of its architecture."""
    from aer_megatron.convert.hf_folder import HFFolder
    from aer_megatron.convert.mapping import check_hf_tensors

    folder = HFFolder(path)
    check_hf_tensors(_architecture(path), folder.shapes(), folder.get)
    return folder.get


def _has_weights(path: str) -> bool:
    return any(Path(path).glob("*.safetensors"))


def _stage_digest(config: Config) -> str:
    """Changes with anything that the supervised stage's result depends on."""
    init = Path(_init_path(config))
    files = {file.name: file.stat().st_size for file in sorted(init.iterdir()) if file.is_file()}
    return config_digest(
        {
            "sft": config.sft.model_dump(),
            "data": config.data.model_dump(),
            "seed": config.run.seed,
            "dtype": config.model.dtype,
            "model": (init / "config.json").read_text(encoding="utf-8"),
            "files": files,
        }
    )


def _is_made(config: Config) -> bool:
    target = Path(config.model.path)
    stamp = target / STAGE_FILE
    if stamp.is_file():
        return bool(json.loads(stamp.read_text(encoding="utf-8")).get("digest") == _stage_digest(config))
    if target.exists():
        raise ValueError(
            f"model.path={config.model.path!r} exists and was not made by --stage=sft; it is left alone: choose another"
        )
    return False


def _quiet_libraries() -> None:
    """Megatron-Core and torch warn about every optional package that is absent; run.json lists the versions."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\..*")
    # Megatron reads .grad of the views that it keeps as gradient accumulators
    warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(megatron|torch)\..*")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(megatron|torch)\..*")
    for name in ("megatron", "torch.distributed", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())

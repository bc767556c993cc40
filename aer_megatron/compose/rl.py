"""The reinforcement-learning stage: builds its parts, resumes, and hands them to the loop."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from aer_megatron._C import DifficultyLedger
from aer_megatron.actor.actor import Actor
from aer_megatron.algo import controller
from aer_megatron.checkpoint.folder import no_best
from aer_megatron.checkpoint.store import Checkpoint, CheckpointStore
from aer_megatron.compose.common import Process, build_policy, checked_weights, held, open_reporter
from aer_megatron.compose.data import Data, load_data
from aer_megatron.compose.engines import build_engine
from aer_megatron.compose.evaluation import evaluation_sets, last_evaluation_is_missing
from aer_megatron.compose.exports import EXPORT_FOLDER, Exports
from aer_megatron.compose.incidents import GuardedPolicy
from aer_megatron.compose.samples import RunSamples
from aer_megatron.compose.saves import RunSaves, best_step
from aer_megatron.compose.throughput import run_throughput
from aer_megatron.config import Config
from aer_megatron.data.prompts import PromptCursor
from aer_megatron.files.run_lock import LOCK_FILE
from aer_megatron.loop.asynchronous import train_ahead
from aer_megatron.loop.parts import NoSamples, Parts, PendingBatch, Progress, RolloutParts, Samples
from aer_megatron.loop.phases import Phases
from aer_megatron.loop.synchronous import train
from aer_megatron.parallel.agreement import on_first_rank
from aer_megatron.parallel.gather import gather_batch
from aer_megatron.parallel.platform import Platform
from aer_megatron.parallel.topology import Topology
from aer_megatron.report.flight import FlightWriter
from aer_megatron.report.samples import SampleWriter, truncate_samples
from aer_megatron.report.sinks.opening import check_sinks
from aer_megatron.report.timer import PhaseTimer
from aer_megatron.report.writer import METRICS_FILE, changed_options, split_lines
from aer_megatron.rewards.pool import VerifierPool
from aer_megatron.rewards.scoring import reason_counts, score_groups
from aer_megatron.rollout.collect import RolloutCollector
from aer_megatron.rollout.engine import SamplingOptions
from aer_megatron.rollout.seeds import stream_seed


def run_rl(config: Config, process: Process, topology: Topology, arguments: Sequence[str]) -> None:
    """Trains, and saves the run at its last step or where it is asked to stop.

    It continues from the newest checkpoint of ``run.output_dir``.
    """
    platform = process.platform
    folder = Path(config.run.output_dir)
    with held({folder / LOCK_FILE: f"run.output_dir={config.run.output_dir!r}"}, platform):
        on_first_rank(lambda: check_sinks(config.report), rank=platform.rank, device=platform.device)
        store = CheckpointStore(
            folder / "checkpoints",
            topology=topology,
            device=platform.device,
            keep=config.run.keep_checkpoints,
            best=best_step(folder / METRICS_FILE, config.run.keep_best) if config.run.keep_best else no_best,
        )
        checkpoint = store.latest()
        lost = 0 if checkpoint is not None else sum(1 for _ in split_lines(folder / METRICS_FILE))
        if lost:
            process.say(f"{folder} has no checkpoint: its {lost} steps are dropped, the run begins anew at step 0")
        if checkpoint is not None and not config.run.resume:
            raise ValueError(
                f"run.resume=false, but run.output_dir={config.run.output_dir!r} holds checkpoints up to step "
                f"{checkpoint.step}; remove them, choose another run.output_dir, or set run.resume=true"
            )
        data = load_data(config)  # also of a finished run: what is wrong is said
        if checkpoint is not None:
            line, finished = on_first_rank(
                lambda: _what_it_finds(config, checkpoint), rank=platform.rank, device=platform.device
            )
            process.say(line)
        if checkpoint is None or not finished:
            next_step = _train(config, process, topology, arguments, data, (store, checkpoint))
            process.say_stopped(f"saved {folder}/checkpoints/step_{next_step:08d}", next_step)
            if next_step == config.run.num_steps:
                process.say(f"done: {next_step} steps; see {', '.join(map(str, _results(config)))}")


def _results(config: Config) -> list[Path]:
    """Returns what the user will want to look at."""
    from aer_megatron.report.picture import PICTURE_FILE  # needs matplotlib

    names = ([PICTURE_FILE] if config.report.picture else []) + [METRICS_FILE]
    names += [EXPORT_FOLDER] if config.run.export_every else []
    return [Path(config.run.output_dir) / name for name in names]


def _what_it_finds(config: Config, checkpoint: Checkpoint) -> tuple[str, bool]:
    """Returns (where an existing run goes on, or that it is finished, and what is different; whether it is)."""
    changes = ", ".join(changed_options(config.run.output_dir, config))
    trained = checkpoint.step >= config.run.num_steps
    if not trained or last_evaluation_is_missing(config):
        what = (
            f"evaluates the policy of {checkpoint.folder}"
            if trained
            else f"resumed at step {checkpoint.step} of {checkpoint.folder}"
        )
        return f"{what}; changed: {changes}" if changes else f"{what}; same configuration", False
    different = f"; its configuration differs, and this one was not used: {changes}" if changes else ""
    return (
        f"{config.run.output_dir} is finished: {checkpoint.folder} is at step {checkpoint.step} of run.num_steps="
        f"{config.run.num_steps}, nothing was trained{different}; raise run.num_steps to go on, or choose another "
        "run.output_dir"
    ), True


def _train(
    config: Config,
    process: Process,
    topology: Topology,
    arguments: Sequence[str],
    data: Data,
    found: tuple[CheckpointStore, Checkpoint | None],
) -> int:
    """Returns the next step, after training from what was ``found``."""
    platform, stops, (store, checkpoint) = process.platform, process.stops, found
    actor = build_policy(config, platform, topology)
    # state of a new run, or that of the checkpoint
    for note in data.notes:
        process.say(note)
    cursor = PromptCursor(data.train, config.run.seed)
    ledger = DifficultyLedger(config.algo.ledger.decay, len(data.train))
    start = Progress(0, 0, controller.initial_state(config.algo.entropy), cursor.state_dict())
    if checkpoint is not None:
        start = _progress_from(store.load(checkpoint, actor))
        cursor.load_state_dict(start.cursor)
        ledger = DifficultyLedger.load(str(checkpoint.path_of("ledger")))
    else:
        actor.load_hf_weights(checked_weights(config.model.path))
    if config.algo.kl_coefficient:  # also on resume: the reference is the policy that the run began with
        actor.hold_reference(checked_weights(config.model.path))

    timer = PhaseTimer(on_phase=process.enter_phase, first_step=start.next_step)
    with ExitStack() as stack:
        saves = stack.enter_context(_saves(config, platform, store, actor, ledger))
        reporter = stack.enter_context(open_reporter(config, platform, start.next_step, arguments))
        flight = _open_flight_recorder(config, platform, start.next_step, stack)
        exports = Exports(config, actor, platform, timer)
        parts = Parts(
            prompts=cursor,
            rollouts=rollout_parts(config, platform, data, stack),
            policy=GuardedPolicy(actor, config, platform),
            ledger=ledger,
            saves=saves,
            flight=flight,
            reporter=reporter,
            timer=timer,
            samples=_samples(config, platform, data, start.next_step, stack),
            export=exports.write,
            throughput=run_throughput(config, platform),
            stop_requested=stops.requested,
        )
        loop = train_ahead if config.rollout.staleness else train
        stops.begin_steps()
        next_step = loop(Phases(config, parts, start))
        stops.end_steps()
        exports.write_cards()
    return next_step


def rollout_parts(config: Config, platform: Platform, data: Data, stack: ExitStack) -> RolloutParts:
    """Returns collectors, verifier pool and weight sync around the engine; ``stack`` closes them."""
    rollout = config.rollout
    engine, weight_sync = build_engine(config, platform, stack)
    rewards = config.rewards
    pool = stack.enter_context(VerifierPool(rewards.num_workers, rewards.timeout_s, rewards.memory_mb))

    collector = RolloutCollector(
        engine,
        SamplingOptions(rollout.temperature, rollout.top_p, rollout.top_k, frozenset(data.stop_ids)),
        num_samples=rollout.group_size,
        max_new_tokens=rollout.max_new_tokens,
        stream_seed=stream_seed(config.run.seed, "train"),
        rank=platform.rank,
        world_size=platform.world_size,
    )

    def gather(scored: list[Any]) -> tuple[Any, dict[str, int]]:
        return gather_batch(scored, reason_counts(scored), device=platform.device)

    return RolloutParts(
        collector=collector,
        evaluation=evaluation_sets(config, engine, data, platform, pool),
        score_groups=functools.partial(score_groups, decode=data.decode, pool=pool),
        gather=gather,
        weight_sync=weight_sync,
    )


def _open_flight_recorder(config: Config, platform: Platform, start_step: int, stack: ExitStack) -> Any:
    """Returns rank 0's recorder, None elsewhere; records beyond the resume step go, also with the recorder off."""
    if platform.rank != 0:
        return None
    writer = FlightWriter(config.run.output_dir)
    writer.truncate_from(start_step)
    stack.enter_context(writer)
    return writer if config.report.flight_recorder else None


def _samples(config: Config, platform: Platform, data: Data, start_step: int, stack: ExitStack) -> Samples:
    """Returns what keeps samples; those beyond the resume step go, also where none are kept any more."""
    folder = config.run.output_dir
    if platform.rank == 0:
        truncate_samples(folder, start_step)
    if not config.report.samples:
        return NoSamples()
    writer = stack.enter_context(SampleWriter(folder, rank=platform.rank))
    return RunSamples(writer, data.decode, groups_per_step=config.report.samples)


def _saves(
    config: Config, platform: Platform, store: CheckpointStore, actor: Actor, ledger: DifficultyLedger
) -> RunSaves:
    def files() -> dict[str, Callable[[Path], None]]:
        if platform.rank != 0:
            return {}
        now = ledger.copy()  # the run's own goes on counting while this one is written
        return {"ledger": lambda path: now.save(str(path))}

    beside = config.run.async_checkpoint
    return RunSaves(store, actor, _progress_table, files, beside=beside, speaks=platform.rank == 0)


def _progress_table(progress: Progress) -> dict[str, Any]:
    return {
        "next_step": progress.next_step,
        "policy_version": progress.policy_version,
        "controller": controller.state_to_dict(progress.controller_state),
        "cursor": dict(progress.cursor),
        "pending": [dataclasses.asdict(batch) for batch in progress.pending],
    }


def _progress_from(table: Mapping[str, Any]) -> Progress:
    try:
        return Progress(
            next_step=table["next_step"],
            policy_version=table["policy_version"],
            controller_state=controller.state_from_dict(table["controller"]),
            cursor=table["cursor"],
            # a checkpoint of before generation could run ahead has none
            pending=tuple(
                PendingBatch(batch["step"], tuple(batch["prompt_ids"]), batch["num_skipped"])
                for batch in table.get("pending", ())
            ),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"the checkpoint's state is of another kind of run ({error!r}); start a new run.output_dir"
        ) from None

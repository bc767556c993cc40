"""What both stages need: the policy, its weights, the reporter, the watchdog; each from the run's configuration."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from aer_megatron.actor.actor import Actor
from aer_megatron.compose.quantization import check_quantization
from aer_megatron.compose.saves import check_best
from aer_megatron.compose.step_plan import StepPlan
from aer_megatron.config import Config
from aer_megatron.console.standard_streams import say
from aer_megatron.convert.architecture import ModelArchitecture, check_parallel, pad_query_groups
from aer_megatron.convert.hf_config import architecture_from_hf_config
from aer_megatron.convert.hf_folder import HFFolder
from aer_megatron.convert.mapping import check_hf_tensors
from aer_megatron.files.json_input import read_json_object
from aer_megatron.files.run_lock import RunLock
from aer_megatron.options.training import OptimizerSection
from aer_megatron.parallel.agreement import on_first_rank
from aer_megatron.parallel.platform import Platform, job_id, set_collective_timeout
from aer_megatron.parallel.stop import StopRequests
from aer_megatron.parallel.topology import Topology, initialize_topology
from aer_megatron.parallel.watchdog import Watchdog, distributed_store
from aer_megatron.report.reporter import NullReporter, Reporter
from aer_megatron.report.writer import package_versions, write_run_manifest

# torch's own limit for one collective counts the time in which a whole job is suspended; the watchdog's does not
WATCHED_TIMEOUT_S = 30 * 86400.0
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


@dataclass(frozen=True, slots=True)
class Process:
    """This rank as the stages see it: what it runs on, who watches it, who may stop it, and how it speaks."""

    platform: Platform
    watchdog: Watchdog
    stops: StopRequests
    listeners: tuple[Callable[[str, int | None], None], ...] = ()  # to phases, beside these two

    def enter_phase(self, phase: str, step: int | None) -> None:
        """Tells watchdog, stop requests and listeners where the rank is."""
        for listener in (self.watchdog.enter_phase, self.stops.enter_phase, *self.listeners):
            listener(phase, step)

    def say(self, text: str) -> None:
        """Writes one line for the user, on rank 0."""
        if self.platform.rank == 0:
            say(text)

    def say_stopped(self, saved: str, next_step: int) -> None:
        """Says how to go on, where the run was asked to stop."""
        if self.stops.agreed:
            self.say(f"{self.stops.agreed.text}: {saved}; the same command goes on at step {next_step}")


def build_topology(config: Config) -> Topology:
    """Returns this rank's place in the layout of ``[parallel]``; every rank calls it."""
    parallel = config.parallel
    return initialize_topology(
        tp=parallel.tp,
        pp=parallel.pp,
        vpp=parallel.vpp,
        cp=parallel.cp,
        ep=parallel.ep,
        seed=config.run.seed,
        timeout_s=WATCHED_TIMEOUT_S if config.run.hang_timeout_s else collective_timeout_s(config),
    )


def collective_timeout_s(config: Config) -> float:
    """Returns torch's limit for the ranks to meet, and for one collective where no watchdog is: behind its own one."""
    return 60.0 + 1.5 * (config.run.hang_timeout_s or 600.0)


def build_actor(
    config: Config, path: str, platform: Platform, topology: Topology, *, optimizer: OptimizerSection, num_updates: int
) -> Actor:
    """Returns the policy of the folder ``path``, without its weights; ``num_updates`` is the schedule's length."""
    return Actor(
        architecture(path, tp=config.parallel.tp),
        config,
        topology,
        device=platform.device,
        optimizer=optimizer,
        num_updates_planned=num_updates,
    )


def build_policy(config: Config, platform: Platform, topology: Topology) -> Actor:
    """Returns the policy of a reinforcement-learning run, without its weights."""
    updates = config.run.num_steps * config.algo.num_minibatches
    return build_actor(config, config.model.path, platform, topology, optimizer=config.optimizer, num_updates=updates)


def architecture(path: str, tp: int = 1) -> ModelArchitecture:
    """Returns the architecture of a Hugging Face folder, with zero query groups where tp does not divide the heads."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ValueError(f"model folder {path!r} has no config.json; give a Hugging Face folder (model.path, sft.init)")
    table = read_json_object(file)
    try:
        return pad_query_groups(architecture_from_hf_config(table), tp)
    except ValueError as error:
        raise ValueError(str(error).replace("config.json", str(file), 1)) from None


def check_model(config: Config, path: str) -> None:
    """Raises ValueError unless layout and engine fit the model, sequences its positions and options one another."""
    for check in model_checks(config, path):
        check()


def model_checks(config: Config, path: str) -> list[Callable[[], None]]:
    """Returns the checks of ``check_model``; raises ValueError where the model's config.json is not readable."""
    parallel = config.parallel
    arch = architecture(path, tp=parallel.tp)
    return [
        functools.partial(check_parallel, arch, parallel.tp, parallel.pp, vpp=parallel.vpp, ep=parallel.ep),
        functools.partial(check_quantization, config, arch),
        StepPlan(config, arch).check_positions,
        functools.partial(check_best, config),
    ]


def checked_weights(path: str) -> Callable[[str], Tensor]:
    """Returns the getter of a Hugging Face folder whose tensors are exactly those of its architecture."""
    folder = HFFolder(path)
    check_hf_tensors(architecture(path), folder.shapes(), folder.get)
    return folder.get


def open_reporter(config: Config, platform: Platform, start_step: int, arguments: Sequence[str]) -> Any:
    """Returns rank 0's reporter, which has written run.json, and one that does nothing elsewhere."""
    if platform.rank != 0:
        return NullReporter()
    write_run_manifest(
        config.run.output_dir,
        config,
        package_versions(VERSIONED_PACKAGES),
        command=["aer_megatron.train", *arguments],
        num_ranks=platform.world_size,
        first_step=start_step,
    )
    return Reporter.open(config, folder=config.run.output_dir, num_steps=config.run.num_steps, start_step=start_step)


@contextmanager
def held(locks: Mapping[Path, str], platform: Platform) -> Iterator[None]:
    """Holds lock files on rank 0 for the context; ``locks`` maps each to the option that it protects.

    Raises:
        ValueError: on every rank, where another run holds one.
    """
    with ExitStack() as stack:

        def take() -> None:
            for path, option in locks.items():
                stack.enter_context(RunLock(path, option=option, job=job_id()))

        on_first_rank(take, rank=platform.rank, device=platform.device)
        yield


def open_watchdog(config: Config, platform: Platform) -> Watchdog:
    """Returns the watchdog that ends a run in which a phase takes longer than ``run.hang_timeout_s``."""
    if config.run.hang_timeout_s:
        set_collective_timeout(WATCHED_TIMEOUT_S)

    def advice() -> str:
        folder = Path(config.run.output_dir) / "checkpoints"
        newest = max((path for path in folder.glob("step_*") if path.name[5:].isdigit()), default=None)
        resume = f"the newest is {newest}, from which the same command goes on" if newest else "there is none yet"
        return f"no checkpoint can be made now: {resume}"

    return Watchdog(
        rank=platform.rank,
        num_ranks=platform.world_size,
        timeout_s=config.run.hang_timeout_s,
        say=functools.partial(print, file=sys.stderr, flush=True),
        store=distributed_store(),
        advice=advice,
    )

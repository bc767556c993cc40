"""The supervised stage: trains the model of ``sft.init`` and writes ``model.path``, once per configuration."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from aer_megatron.actor.actor import Actor
from aer_megatron.actor.model import TORCH_DTYPES
from aer_megatron.checkpoint.store import CheckpointStore
from aer_megatron.compose.common import Process, build_actor, checked_weights, held, open_reporter
from aer_megatron.config import Config
from aer_megatron.config_loading import config_digest
from aer_megatron.convert.hf_folder import HFFolder, read_hf_config
from aer_megatron.convert.hf_writer import copy_extra_files, fill_hf_folder
from aer_megatron.convert.mapping import hf_specs
from aer_megatron.convert.random_weights import random_hf_weights
from aer_megatron.data.skipped import OnSkip, SkippedRecords
from aer_megatron.data.supervised import SupervisedSource
from aer_megatron.data.tokenizer import load_tokenizer, stop_token_ids
from aer_megatron.files.json_input import read_json_object
from aer_megatron.files.new_folder import new_folder, remove_folder
from aer_megatron.files.run_lock import LOCK_FILE
from aer_megatron.loop.supervised import run_supervised
from aer_megatron.parallel.agreement import on_first_rank
from aer_megatron.parallel.exchange import barrier
from aer_megatron.parallel.platform import Platform
from aer_megatron.parallel.topology import Topology
from aer_megatron.report.sinks.opening import check_sinks
from aer_megatron.report.timer import PhaseTimer

STAGE_FILE = "aer_stage.json"


def run_sft(config: Config, process: Process, topology: Topology, arguments: Sequence[str]) -> None:
    """Writes ``model.path`` unless it is there; refused while another run is at it."""
    with held(supervised_locks(config), process.platform):
        if not is_made(config):
            _make(config, process, topology, arguments, Path(config.run.output_dir) / "sft")


def supervised_locks(config: Config) -> dict[Path, str]:
    """Returns the lock files of what the stage writes, with the options that they protect."""
    target, folder = Path(config.model.path), Path(config.run.output_dir) / "sft"
    return {
        # beside the folder, which is replaced as a whole
        target.with_name(f".{target.name}.{LOCK_FILE}"): f"model.path={config.model.path!r}",
        folder / LOCK_FILE: f"run.output_dir={config.run.output_dir!r} (its sft/)",
    }


def _make(config: Config, process: Process, topology: Topology, arguments: Sequence[str], folder: Path) -> None:
    """Trains from sft.init, or from where an earlier launch was stopped, and writes model.path at the end."""
    init, options, platform, stops = init_path(config), config.sft, process.platform, process.stops
    on_first_rank(lambda: check_sinks(config.report), rank=platform.rank, device=platform.device)
    skipped = SkippedRecords()
    source = supervised_source(config, init, dp=topology.dp, on_skip=skipped)
    for note in skipped.lines("sft.source", source.num_records):
        process.say(note)
    actor = build_actor(config, init, platform, topology, optimizer=options.optimizer, num_updates=options.num_steps)
    # of this configuration and no other; written where the stage is stopped, removed at its end
    kept = folder / f"stopped-{_stage_digest(config)}"
    store = CheckpointStore(kept, topology=topology, device=platform.device, keep=1)
    stopped = store.latest()
    first_step = 0 if stopped is None else stopped.step
    if stopped is not None:
        store.load(stopped, actor)
        process.say(f"resumed at step {first_step} of {stopped.folder}")
    else:
        actor.load_hf_weights(checked_weights(init) if _has_weights(init) else random_hf_weights(init, config.run.seed))
    # training, from there to the end or a stop
    with open_reporter(_reported(config, folder), platform, first_step, arguments) as reporter:
        stops.begin_steps()
        next_step = run_supervised(
            actor,
            source.batch,
            steps=range(first_step, options.num_steps),
            reporter=reporter,
            timer=PhaseTimer(on_phase=process.enter_phase, first_step=first_step),
            stop_requested=stops.requested,
        )
        stops.end_steps()
    # the policy, or what it takes to go on
    if next_step < options.num_steps:
        saved = store.save(actor, step=next_step, state={}, files={})
        process.say_stopped(f"saved {saved.folder}", next_step)
        return
    _write_policy(config, actor, init, platform)
    if platform.rank == 0:
        shutil.rmtree(kept, ignore_errors=True)


def supervised_source(config: Config, init: str, *, dp: int, on_skip: OnSkip) -> SupervisedSource:
    """Returns the stage's batches; raises ValueError where it has none, or they do not fit ``dp`` replicas."""
    options = config.sft
    if options.source is None:
        raise ValueError('--stage=sft needs a [sft.source] table: a file with responses, or task = "countdown"')
    if options.batch_size % dp:
        raise ValueError(
            f"sft.batch_size={options.batch_size} must be a multiple of the data-parallel size {dp}; "
            f"use {-(-options.batch_size // dp) * dp}"
        )
    tokenizer = load_tokenizer(init)
    return SupervisedSource(
        options.source,
        config.data,
        tokenizer,
        eos_id=stop_token_ids(init, tokenizer)[0],
        batch_size=options.batch_size,
        seed=config.run.seed,
        on_skip=on_skip,
    )


def _reported(config: Config, folder: Path) -> Config:
    """Returns the configuration under which the stage reports: a run of its own in ``folder``."""
    return config.with_options(
        {
            "run.output_dir": str(folder),
            "run.name": f"{config.run.name} (sft)",
            "run.num_steps": config.sft.num_steps,
            "report.picture": False,
        }
    )


def _write_policy(config: Config, actor: Actor, init: str, platform: Platform) -> None:
    """Writes model.path from the actor; a folder that an earlier supervised stage made is replaced."""
    target = Path(config.model.path)
    weights: Iterator[tuple[str, Any]] = actor.hf_weights()
    if platform.rank == 0:
        if (target / STAGE_FILE).is_file():
            remove_folder(target)  # half deleted it would be taken for somebody else's
        specs = hf_specs(actor.arch, TORCH_DTYPES[config.model.dtype])
        with new_folder(target) as work:
            fill_hf_folder(work, weights, specs, config=read_hf_config(Path(init)))
            copy_extra_files(Path(init), work)
            # part of the folder from its first moment: one without it is taken for somebody else's
            (work / STAGE_FILE).write_text(json.dumps({"digest": _stage_digest(config)}) + "\n", encoding="utf-8")
        HFFolder(target)  # reads back what was written
    else:
        for _ in weights:
            pass
    barrier()


def init_path(config: Config) -> str:
    """Returns the folder that the stage starts from; raises ValueError if there is none."""
    if config.sft.init is None:
        raise ValueError("--stage=sft needs sft.init: the Hugging Face folder to start from")
    return config.sft.init


def _has_weights(path: str) -> bool:
    return any(Path(path).glob("*.safetensors"))


def _stage_digest(config: Config) -> str:
    """Changes with anything that the supervised stage's result depends on."""
    init = Path(init_path(config))
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


def is_made(config: Config) -> bool:
    """Returns whether ``model.path`` is this configuration's result; raises ValueError if it is somebody else's."""
    target = Path(config.model.path)
    stamp = target / STAGE_FILE
    if stamp.is_file():
        return bool(read_json_object(stamp).get("digest") == _stage_digest(config))
    if target.exists():
        raise ValueError(
            f"model.path={config.model.path!r} exists and was not made by --stage=sft; it is left alone: choose another"
        )
    return False

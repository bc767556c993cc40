"""Takes a checkpoint through other layouts and back, without training: what comes back must be what went."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from aer_megatron.actor.actor import Actor
from aer_megatron.checkpoint.store import CheckpointStore
from aer_megatron.compose.common import build_actor, build_topology
from aer_megatron.config import Config
from aer_megatron.parallel.platform import Platform
from aer_megatron.parallel.topology import Topology, leave_layout


def reshard(own: Config, others: Mapping[str, Config], platform: Platform, source: Path, target: Path) -> None:
    """Returns when ``target``/NAME/back holds the newest checkpoint of ``source``, for every layout by its name.

    It was loaded and saved under that layout, then loaded and saved under the run's own; every rank calls it.

    Raises:
        ValueError, RuntimeError: a checkpoint cannot be read or written.
    """
    for name, config in others.items():
        _load_and_save(config, platform, source, target / name / "there")
        _load_and_save(own, platform, target / name / "there", target / name / "back")


def _load_and_save(config: Config, platform: Platform, source: Path, target: Path) -> None:
    topology = build_topology(config)
    actor = build_actor(
        config,
        config.model.path,
        platform,
        topology,
        optimizer=config.optimizer,
        num_updates=config.run.num_steps * config.algo.num_minibatches,
    )
    checkpoint = _store(source, actor, topology).latest()
    if checkpoint is None:
        raise RuntimeError(f"{source} holds no finished checkpoint")
    state = _store(source, actor, topology).load(checkpoint, actor)
    ledger = checkpoint.path_of("ledger")
    _store(target, actor, topology).save(
        actor,
        step=checkpoint.step,
        state=state,
        files={"ledger": lambda path: Path(shutil.copyfile(ledger, path)).touch()},
    )
    leave_layout()


def _store(folder: Path, actor: Actor, topology: Topology) -> CheckpointStore:
    return CheckpointStore(folder, topology=topology, device=actor.device, keep=1)

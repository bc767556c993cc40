"""Takes a checkpoint through other layouts and back, without training: what comes back must be what went.

aer launch --nproc N -m aer_megatron.verify_resume.resharding JOB.json        what verify_resume/command.py starts
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from aer_megatron.actor.actor import Actor
from aer_megatron.checkpoint.store import CheckpointStore
from aer_megatron.compose.common import build_policy, build_topology, collective_timeout_s
from aer_megatron.config import Config
from aer_megatron.config_loading import load_config
from aer_megatron.console.command_line import quiet_libraries
from aer_megatron.console.failures import LOG_FOLDER, Edge, run_command
from aer_megatron.parallel import platform as platforms
from aer_megatron.parallel.platform import Platform
from aer_megatron.parallel.topology import Topology, destroy_topology, leave_layout


def reshard(own: Config, others: Mapping[str, Config], platform: Platform, source: Path, target: Path) -> None:
    """Loads the newest checkpoint of ``source`` under each layout and saves it, then does so under the run's own.

    Every rank calls it; what comes back is in ``target``/NAME/back, by the layout's name.

    Raises:
        ValueError, RuntimeError: a checkpoint cannot be read or written.
    """
    for name, config in others.items():
        _load_and_save(config, platform, source, target / name / "there")
        _load_and_save(own, platform, target / name / "there", target / name / "back")


def _load_and_save(config: Config, platform: Platform, source: Path, target: Path) -> None:
    topology = build_topology(config)
    actor = build_policy(config, platform, topology)
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


def _run(job: Path, edge: Edge) -> int:
    table = json.loads(job.read_text(encoding="utf-8"))
    own = load_config(table["run_file"], table["overrides"])
    edge.log_folder = Path(own.run.output_dir) / LOG_FOLDER
    layouts = {
        name: load_config(table["run_file"], [*table["overrides"], *changes])
        for name, changes in table["layouts"].items()
    }
    platform = platforms.install_platform()
    platforms.initialize_process_group(platform, timeout_s=collective_timeout_s(own))
    try:
        with edge.noting():
            reshard(own, layouts, platform, Path(table["source"]), Path(table["target"]))
    finally:
        destroy_topology()
    return 0


if __name__ == "__main__":
    quiet_libraries()
    sys.exit(run_command(lambda edge: _run(Path(sys.argv[1]), edge)))

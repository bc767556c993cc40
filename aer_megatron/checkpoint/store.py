"""Checkpoints of a run: written beside and renamed into place, verified before anything is loaded.

    run/checkpoints/step_00000050/manifest.json            one manifest names every other file
                                  model-tp00-pp00.safetensors, optimizer-..., rng-..., ledger, ...
    run/checkpoints/step_00000100.tmp-new/                 being written; a killed save leaves it behind

Every rank writes and checks its own files, so the folder must be one that all ranks share. Whatever goes wrong on one
rank is raised on all of them: no rank waits for another that has given up. Reasons: docs/adr/0003-checkpoints.md.

This file does NOT know what the tensors are (tensors.py), how a save goes on once they are at hand
(save.py), nor what the caller's state means.
"""

from __future__ import annotations

import functools
import json
import logging
import platform
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from aer_megatron.actor.actor import Actor
from aer_megatron.checkpoint.buffer import HostBuffer, TensorFile, tensor_file
from aer_megatron.checkpoint.folder import CheckpointFolder, ChooseBest, no_best
from aer_megatron.checkpoint.manifest import (
    MANIFEST_NAME,
    Manifest,
    check_file,
    check_file_name,
    check_model,
    is_sealed,
    manifest_from_json,
    read_manifest_text,
)
from aer_megatron.checkpoint.save import SAVE_FAILURES, SaveJob, SavePlan, Writer
from aer_megatron.checkpoint.tensors import (
    ActorTensors,
    actor_dtype,
    actor_layout,
    apply_actor_tensors,
    files_of,
    own_files,
    read_actor_tensors,
)
from aer_megatron.convert.architecture import ModelArchitecture, MoeArchitecture
from aer_megatron.parallel.agreement import on_all_ranks
from aer_megatron.parallel.mailbox import Mailbox
from aer_megatron.parallel.topology import Topology

_LOG = logging.getLogger(__name__)
_PACKAGES = ("aer-megatron", "torch", "megatron-core", "safetensors", "numpy")


class SaveError(RuntimeError):
    """A checkpoint could not be written; those before it are untouched."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A finished checkpoint on disk. ``state`` is what the run passed to ``save``."""

    folder: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def state(self) -> Mapping[str, Any]:
        return self.manifest.state

    def path_of(self, name: str) -> Path:
        """Returns the path of a file that ``save`` was given under ``name``. Raises ValueError where it has none."""
        entry = self.manifest.files.get(name)
        if entry is None or entry.part != "file":
            present = sorted(name for name, entry in self.manifest.files.items() if entry.part == "file")
            raise ValueError(f"{self.folder} holds no {name!r}, only {present}; it was written by another kind of run")
        return self.folder / name


class CheckpointStore:
    """The checkpoints in one folder. Every method is called on every rank with the same arguments."""

    def __init__(
        self, folder: Path, *, topology: Topology, device: torch.device, keep: int, best: ChooseBest = no_best
    ) -> None:
        """``device`` carries the ranks' agreement (that of the default process group); ``keep`` >= 1.

        ``best`` chooses one checkpoint more that is kept; it is called on rank 0, perhaps beside training.
        """
        if keep < 1:
            raise ValueError(f"keep_checkpoints={keep} must be at least 1: the newest checkpoint is always kept")
        self._folder = CheckpointFolder(folder, keep, best)
        self._topology = topology
        self._on_all_ranks = functools.partial(on_all_ranks, device=device, failures=SAVE_FAILURES)
        self._buffer = HostBuffer(device)
        self._mailbox: Mailbox | None = None
        self._job: SaveJob | None = None

    def save(self, actor: Actor, *, step: int, state: Mapping[str, Any], files: Mapping[str, Writer]) -> Checkpoint:
        """Returns the checkpoint once all of it is on disk under its final name and older ones are pruned.

        ``state`` must survive JSON; ``files`` maps plain file names to functions that write them, called on rank 0.

        Raises:
            SaveError: on every rank, where any of them could not write, or where the folder holds a later step (of
                another run); earlier checkpoints are untouched.
        """
        self.begin(actor, step=step, state=state, files=files, beside=False)
        self.wait()
        checkpoint = self.latest()
        assert checkpoint is not None and checkpoint.step == step
        return checkpoint

    def begin(
        self, actor: Actor, *, step: int, state: Mapping[str, Any], files: Mapping[str, Writer], beside: bool
    ) -> None:
        """Begins a save, whose end ``wait`` awaits: on disk when it returns, or with ``beside`` soon after.

        With ``beside`` it returns once the tensors are copied into a buffer of host memory, which is kept for the next
        save; ``files``' functions are then called in a thread and must write what was true now.

        Raises:
            SaveError: on every rank, where any of them has no room for it, or as in ``save``.
            RuntimeError: the save before this one was not waited for.
        """
        if self._job is not None:
            raise RuntimeError(f"the save of step {self._job.step} is under way: wait for it first")
        for name in files:
            check_file_name(name)
            if name.endswith(".safetensors"):
                raise ValueError(f"a checkpoint file cannot be named {name!r}: the parts have such names")
        manifest = _begun_manifest(actor, step, json.loads(json.dumps(state)))
        tensors = {name: tensor_file(part, of_file) for name, (part, of_file) in own_files(actor).items()}
        plan = self._plan(manifest, tensors, beside)
        self._mailbox = self._mailbox or Mailbox()
        self._job = SaveJob(
            plan,
            self._folder,
            self._mailbox,
            self._buffer.copy(tensors) if beside else tensors,
            files if self._topology.rank == 0 else {},
            rank=self._topology.rank,
        )
        if beside:
            self._job.start()
        else:
            self._job.run()

    def wait(self) -> None:
        """Waits until the checkpoint that was begun is on disk under its final name; at once where none was begun.

        Raises:
            SaveError: on every rank, where any of them could not write it.
        """
        job, self._job = self._job, None
        failure = job.wait() if job is not None else None
        if failure is not None:
            raise SaveError(failure)

    def give_up(self, timeout_s: float) -> None:
        """Lets a save under way finish for at most ``timeout_s``: for a run that ends in an error. Raises nothing."""
        job, self._job = self._job, None
        failure = job.give_up(timeout_s) if job is not None else None
        if failure is not None and self._topology.rank == 0:
            _LOG.warning("%s", failure)

    def newest(self) -> str:
        """Returns the folder of the newest finished checkpoint, or "none", as this rank sees it."""
        finished = self._folder.finished()
        return str(finished[max(finished)]) if finished else "none"

    def latest(self) -> Checkpoint | None:
        """Returns the newest finished checkpoint, the same on every rank, or None; says what is not finished.

        Raises:
            ValueError: on every rank, where its manifest is cut short, changed or not one.
            RuntimeError: on every rank, where the folder cannot be read.
        """

        def look() -> dict[str, Any]:
            if self._topology.rank != 0:
                return {}
            finished = self._folder.finished()
            newest = max(finished, default=0)
            for step, path in self._folder.unfinished().items():
                if step > newest:
                    _LOG.warning("%s has no %s: not finished, going on from step %d", path.name, MANIFEST_NAME, newest)
            return {"name": finished[newest].name, "text": read_manifest_text(finished[newest])} if finished else {}

        found = self._on_all_ranks(look, action=f"read {self._folder.path}", error=RuntimeError)[0]
        if not found:
            return None
        folder = self._folder.path / found["name"]
        manifest = manifest_from_json(found["text"], folder / MANIFEST_NAME)
        if self._topology.rank == 0 and not is_sealed(found["text"]):
            _LOG.warning("%s is of an earlier version: its manifest has no digest, so no change of it is found", folder)
        if folder.name != f"step_{manifest.step:08d}":
            raise ValueError(f"{folder} is the checkpoint of step {manifest.step}; give it the name of that step again")
        return Checkpoint(folder, manifest)

    def load(self, checkpoint: Checkpoint, actor: Actor) -> Mapping[str, Any]:
        """Returns the caller's state after putting weights, optimizer, RNG and update counter into ``actor``.

        ``actor`` must be newly built. Under the layout that wrote it everything is restored bit for bit; under another
        one weights and optimizer state are, and random-number states stay as they were seeded.

        Raises:
            ValueError: on every rank and before ``actor`` is touched: another model or dtype, or a file that is
                missing, truncated or changed.
        """
        manifest, folder = checkpoint.manifest, checkpoint.folder
        check_model(manifest, asdict(actor.arch), actor_dtype(actor), folder)
        unlisted = sorted(files_of(manifest.layout) - manifest.files.keys())
        if unlisted:  # what the manifest does not list is not verified
            raise ValueError(f"{folder}: the manifest lists no {unlisted[0]}, which its layout needs; restore it")
        read: list[ActorTensors] = []

        def verify() -> dict[str, Any]:
            for name, entry in manifest.files.items():
                if entry.rank % self._topology.world_size == self._topology.rank:
                    check_file(folder / name, entry)
            return {}

        def read_tensors() -> dict[str, Any]:
            read.append(read_actor_tensors(actor, folder, manifest.layout, _architecture(manifest.model)))
            return {}

        # two rounds: nobody parses a file before the rank that owns it has found it intact
        for part in (verify, read_tensors):
            self._on_all_ranks(part, error=ValueError)
        apply_actor_tensors(actor, read[0], manifest.num_updates)
        return manifest.state

    def _plan(self, manifest: Manifest, tensors: Mapping[str, TensorFile], beside: bool) -> SavePlan:
        """Returns the plan on which all ranks agree; its folder is made and, where needed, the host buffer."""

        def measure() -> int:
            if beside:
                self._buffer.reserve(tensors)
            return sum(file.num_bytes for file in tensors.values())

        def prepare() -> list[str]:
            if self._topology.rank != 0:
                return []
            return [self._folder.prepare(manifest.step, num_bytes).name, secrets.token_hex(8)]

        action = f"begin the checkpoint of step {manifest.step}"
        num_bytes = sum(self._on_all_ranks(measure, action=action, error=SaveError))
        name, token = self._on_all_ranks(prepare, action=action, error=SaveError)[0]
        return SavePlan(self._folder.path / name, f"aer_megatron/checkpoint/{token}", num_bytes, manifest)


def _begun_manifest(actor: Actor, step: int, state: dict[str, Any]) -> Manifest:
    """Returns the manifest of the actor as it is now, without files."""
    return Manifest(
        step=step,
        num_updates=actor.num_updates,
        model=json.loads(json.dumps(asdict(actor.arch))),
        dtype=actor_dtype(actor),
        layout=actor_layout(actor),
        versions={name: _version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        state=state,
        files={},
    )


def _architecture(table: Mapping[str, Any]) -> ModelArchitecture:
    moe = table.get("moe")
    return ModelArchitecture(**{**table, "moe": MoeArchitecture(**moe) if moe else None})


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"

"""Checkpoints of a run: written beside and renamed into place, verified before anything is loaded.

    run/checkpoints/step_00000050/manifest.json            one manifest names every other file
                                  model-tp00-pp00.safetensors, optimizer-..., rng-..., ledger, ...
    run/checkpoints/step_00000100.tmp-new/                 being written; a killed save leaves it behind

Every rank writes and checks its own files, so the folder must be one that all ranks share. Whatever goes wrong on one
rank is raised on all of them: no rank waits for another that has given up. Reasons: docs/adr/0003-checkpoints.md.

This file does NOT know what the tensors are (checkpoint_tensors.py) nor what the caller's state means.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from aer_megatron.actor.actor import Actor
from aer_megatron.actor.checkpoint_manifest import (
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    check_file,
    check_model,
    file_entry,
    manifest_from_json,
)
from aer_megatron.actor.checkpoint_tensors import (
    ActorTensors,
    actor_dtype,
    actor_layout,
    apply_actor_tensors,
    model_file,
    model_tensors,
    optimizer_file,
    optimizer_tensors,
    read_actor_tensors,
    rng_file,
    rng_tensors,
)
from aer_megatron.convert.architecture import ModelArchitecture, MoeArchitecture
from aer_megatron.convert.hf_folder import flush_to_disk
from aer_megatron.parallel.exchange import all_gather_ragged
from aer_megatron.parallel.topology import Topology

_FINISHED = re.compile(r"step_(\d{8,})")
_LEFTOVER = re.compile(r"step_\d{8,}\.tmp-(new|old)")
_PACKAGES = ("aer-megatron", "torch", "megatron-core", "safetensors", "numpy")
_FAILURES = (OSError, ValueError, RuntimeError, SafetensorError)

Writer = Callable[[Path], None]


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

    def __init__(self, folder: Path, *, topology: Topology, device: torch.device, keep: int) -> None:
        """``device`` carries the ranks' agreement (that of the default process group); ``keep`` >= 1."""
        if keep < 1:
            raise ValueError(f"keep_checkpoints={keep} must be at least 1: the newest checkpoint is always kept")
        self._folder = folder
        self._topology = topology
        self._device = device
        self._keep = keep

    def save(self, actor: Actor, *, step: int, state: Mapping[str, Any], files: Mapping[str, Writer]) -> Checkpoint:
        """Returns the checkpoint once all of it is on disk under its final name and older ones are pruned.

        ``state`` must survive JSON; ``files`` maps plain file names to functions that write them, called on rank 0.

        Raises:
            RuntimeError: on every rank, where any of them could not write, or where the folder holds a later step (of
                another run); earlier checkpoints are untouched.
        """
        for name in files:
            if Path(name).name != name or name == MANIFEST_NAME or name.endswith(".safetensors"):
                raise ValueError(f"a checkpoint file cannot be named {name!r}: use a plain name that no part has")
        final = self._folder / f"step_{step:08d}"
        fresh = self._folder / f"{final.name}.tmp-new"
        state = json.loads(json.dumps(state))  # fails here rather than after minutes of writing

        self._together(lambda: self._prepare(fresh, step), action=f"prepare {fresh}")
        entries = self._together(lambda: self._write_parts(actor, fresh, files), action=f"write {fresh}")
        manifest = Manifest(
            step=step,
            num_updates=actor.num_updates,
            model=json.loads(json.dumps(asdict(actor.arch))),
            dtype=actor_dtype(actor),
            layout=actor_layout(actor),
            versions={name: _version(name) for name in _PACKAGES} | {"python": platform.python_version()},
            state=state,
            files={name: FileEntry(**entry) for part in entries for name, entry in part.items()},
        )
        self._together(lambda: self._finish(manifest, fresh, final), action=f"finish {final}")
        return Checkpoint(final, manifest)

    def latest(self) -> Checkpoint | None:
        """Returns the newest finished checkpoint, the same on every rank, or None.

        Raises:
            ValueError: on every rank, where its manifest is cut short or not one.
            RuntimeError: on every rank, where the folder cannot be read.
        """

        def look() -> dict[str, Any]:
            finished = self._finished() if self._topology.rank == 0 else {}
            if not finished:
                return {}
            folder = finished[max(finished)]
            return {"name": folder.name, "text": (folder / MANIFEST_NAME).read_text("utf-8", errors="replace")}

        found = self._together(look, action=f"read {self._folder}")[0]
        if not found:
            return None
        folder = self._folder / found["name"]
        return Checkpoint(folder, manifest_from_json(found["text"], folder / MANIFEST_NAME))

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
            self._together(part, error=ValueError)
        apply_actor_tensors(actor, read[0], manifest.num_updates)
        return manifest.state

    def remove_leftovers(self) -> None:
        """Removes what killed saves left behind; ``save`` does so too. Waits for nobody."""
        if self._topology.rank == 0 and self._folder.is_dir():
            for path in sorted(self._folder.iterdir()):
                if _LEFTOVER.fullmatch(path.name):
                    shutil.rmtree(path)

    def _prepare(self, fresh: Path, step: int) -> dict[str, Any]:
        if self._topology.rank != 0:
            return {}
        later = max(self._finished(), default=step)
        if later > step:
            # keeping the newest would delete this run's, and a resume would take the other run's
            raise ValueError(f"{self._folder} holds step {later} of another run; move it away or set run.output_dir")
        self.remove_leftovers()
        fresh.mkdir(parents=True)
        return {}

    def _write_parts(self, actor: Actor, fresh: Path, files: Mapping[str, Writer]) -> dict[str, Any]:
        """Writes this rank's files and returns their entries by file name."""
        topology = self._topology
        tp_rank, pp_rank, replica = topology.tp_rank, topology.pp_rank, topology.replica_rank
        parts: list[tuple[str, str, Writer]] = [
            ("model", model_file(tp_rank, pp_rank, topology.ep_rank), lambda p: save_file(model_tensors(actor), p)),
            ("optimizer", optimizer_file(tp_rank, pp_rank, replica), lambda p: save_file(optimizer_tensors(actor), p)),
            ("rng", rng_file(tp_rank, pp_rank, replica), lambda path: save_file(rng_tensors(), path)),
            *(("file", name, writer) for name, writer in files.items()),
        ]
        entries = {}
        for part, name, write in parts:
            if (part == "model" and replica >= topology.ep) or (part == "file" and topology.rank != 0):
                continue  # replicas hold the same weights; every rank holds the same files
            write(fresh / name)
            entries[name] = asdict(file_entry(fresh / name, part=part, rank=topology.rank))
        return entries

    def _finish(self, manifest: Manifest, fresh: Path, final: Path) -> dict[str, Any]:
        """Writes the manifest, renames the folder into place, and only then removes older checkpoints."""
        if self._topology.rank != 0:
            return {}
        with (fresh / MANIFEST_NAME).open("w", encoding="utf-8") as file:
            file.write(manifest.to_json())
            file.flush()
            os.fsync(file.fileno())
        flush_to_disk(fresh)
        if final.exists():
            self._retire(final)
        fresh.rename(final)
        flush_to_disk(self._folder)
        finished = self._finished()
        for step in sorted(finished)[: -self._keep]:
            self._retire(finished[step])
        self.remove_leftovers()
        return {}

    def _retire(self, folder: Path) -> None:
        """Takes a checkpoint out of sight in one rename, so that a half-deleted one never looks finished."""
        folder.rename(folder.with_name(f"{folder.name}.tmp-old"))

    def _finished(self) -> dict[int, Path]:
        """Step -> folder of every checkpoint that has a manifest."""
        paths = sorted(self._folder.iterdir()) if self._folder.is_dir() else []
        matches = [(path, _FINISHED.fullmatch(path.name)) for path in paths]
        return {int(m.group(1)): path for path, m in matches if m and (path / MANIFEST_NAME).is_file()}

    def _together(
        self, work: Callable[[], dict[str, Any]], *, action: str = "", error: type[Exception] = RuntimeError
    ) -> list[dict[str, Any]]:
        """Returns every rank's result of ``work``, in rank order; raises ``error`` on all if it failed on any."""
        try:
            answer: dict[str, Any] = {"result": work()}
        except _FAILURES as failure:
            answer = {"failure": f"{failure}"}
        packed = np.frombuffer(json.dumps(answer).encode(), dtype=np.uint8)
        rows = all_gather_ragged(packed, device=self._device)
        answers = [json.loads(row.tobytes()) for row in rows]
        failures = [(rank, answer["failure"]) for rank, answer in enumerate(answers) if "failure" in answer]
        if failures:
            rank, message = failures[0]
            what = f"cannot {action} (rank {rank}): " if action else ""
            others = f" ({len(failures) - 1} more ranks failed)" if len(failures) > 1 else ""
            raise error(f"{what}{message}{others}")
        return [answer["result"] for answer in answers]


def _architecture(table: Mapping[str, Any]) -> ModelArchitecture:
    moe = table.get("moe")
    return ModelArchitecture(**{**table, "moe": MoeArchitecture(**moe) if moe else None})


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"

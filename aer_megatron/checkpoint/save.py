"""One rank's work on one checkpoint after its tensors are at hand: write, agree, finish. Runs in a thread or in place.

Ranks agree through a ``Mailbox``, not through collectives: each tells rank 0 its files or its failure, rank 0 writes
the manifest and renames the folder, or removes it, and tells all what became of it. No rank waits for one that has
given up.

This file does NOT know what the tensors are.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from aer_megatron.checkpoint.buffer import TensorFile
from aer_megatron.checkpoint.folder import CheckpointFolder
from aer_megatron.checkpoint.manifest import FileEntry, Manifest, file_entry
from aer_megatron.files.disk_space import lacks_space, space_report
from aer_megatron.parallel.agreement import FAILURES, raise_first_failure
from aer_megatron.parallel.mailbox import Mailbox

SAVE_FAILURES: tuple[type[Exception], ...] = (*FAILURES, SafetensorError, MemoryError)

Writer = Callable[[Path], None]


@dataclasses.dataclass(frozen=True, slots=True)
class SavePlan:
    """What every rank knows of a save before anything is written."""

    fresh: Path  # the folder that is being written
    token: str  # makes the topics of this save its own
    num_bytes: int  # of all ranks
    manifest: Manifest  # as far as it is known


class SaveJob:
    """``files`` are this rank's tensors, ``writers`` the caller's own files (rank 0's alone), both by file name."""

    def __init__(
        self,
        plan: SavePlan,
        folder: CheckpointFolder,
        mailbox: Mailbox,
        files: Mapping[str, TensorFile],
        writers: Mapping[str, Writer],
        *,
        rank: int,
    ) -> None:
        self._plan = plan
        self._folder = folder
        self._mailbox = mailbox
        self._files = files
        self._writers = writers
        self._rank = rank
        self._cancelled = threading.Event()
        self._thread: threading.Thread | None = None
        self._failure: str | None = f"the checkpoint of step {plan.manifest.step} was not finished"

    @property
    def step(self) -> int:
        return self._plan.manifest.step

    def start(self) -> None:
        """Begins the work beside the caller."""
        self._thread = threading.Thread(target=self.run, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> str | None:
        """Waits until the work is done; returns None, or why there is no checkpoint, the same on every rank."""
        if self._thread is not None:
            self._thread.join()
        return self._failure

    def give_up(self, timeout_s: float) -> str | None:
        """Returns like ``wait`` at the latest after ``timeout_s``: for a run that ends in an error of its own."""
        if self._thread is not None:
            self._thread.join(timeout_s)
            self._cancelled.set()
        return self._failure

    def run(self) -> None:
        """Does the work in the caller's thread."""
        answer: dict[str, Any] = {"failure": "an error of the program, see above"}
        try:
            try:
                answer = self._answer(self._write)
            finally:  # whatever it was: rank 0 waits for a word
                answers = self._tell(f"{self._plan.token}/files", answer)
            outcome = self._answer(lambda: self._finish(answers)) if self._rank == 0 else {}
            outcome = self._mailbox.broadcast(f"{self._plan.token}/outcome", outcome, cancelled=self._cancelled.is_set)
            self._failure = outcome.get("failure")
        except RuntimeError as error:  # the store is gone: the launcher ends this run
            self._failure = f"{error}"

    def _tell(self, topic: str, value: dict[str, Any]) -> list[dict[str, Any]]:
        return self._mailbox.gather(topic, value, cancelled=self._cancelled.is_set)

    def _write(self) -> dict[str, Any]:
        """Writes this rank's files and returns their entries by file name."""
        entries: dict[str, FileEntry] = {}
        for name, file in self._files.items():
            entries[name] = file.write(self._plan.fresh / name, self._rank)
        for name, write in self._writers.items():
            path = self._plan.fresh / name
            write(path)
            entries[name] = file_entry(path, part="file", rank=self._rank)
        return {name: dataclasses.asdict(entry) for name, entry in entries.items()}

    def _finish(self, answers: list[dict[str, Any]]) -> None:
        """On rank 0: makes a checkpoint of what all ranks wrote, or raises after removing it."""
        fresh, manifest = self._plan.fresh, self._plan.manifest
        try:
            raise_first_failure(answers, f"write {fresh}")
            entries = (answer["result"] for answer in answers)
            files = {name: FileEntry(**entry) for part in entries for name, entry in part.items()}
            self._folder.publish(fresh, manifest.step, dataclasses.replace(manifest, files=files).to_json())
        except SAVE_FAILURES:
            self._folder.discard(fresh)
            raise

    def _answer(self, work: Callable[[], Any]) -> dict[str, Any]:
        try:
            return {"result": work()}
        except SAVE_FAILURES as failure:
            room = f"; {space_report(self._plan.fresh, self._plan.num_bytes)}" if lacks_space(failure) else ""
            return {"failure": f"{failure}{room}", "refused": False}

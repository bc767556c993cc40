"""The folder that holds a run's checkpoints, as rank 0 sees it: what is finished, being written, or on its way out.

    step_00000050/              finished: it has a manifest; may be a link to where the user moved it
    step_00000100.tmp-new/      being written; a killed save leaves it behind
    step_00000025.tmp-old/      taken out of sight in one rename, so that a half-deleted one never looks finished

What cannot be deleted (a file is open elsewhere on NFS, a folder is read-only) is said once and tried again with every
save; a name that is taken by such a leftover blocks nothing.

This file does NOT know ranks, tensors or the content of manifests.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from aer_megatron.checkpoint.manifest import MANIFEST_NAME
from aer_megatron.files.disk_space import has_space, space_report
from aer_megatron.files.new_folder import flush_to_disk

_LOG = logging.getLogger(__name__)
_SMALL_FILES_BYTES = 1 << 16  # manifest, headers and pages that are not full
_STEP = re.compile(r"step_(\d{8,18})")
_LEFTOVER = re.compile(r"step_\d{8,18}\.tmp-(new|old)(-[0-9a-f]{8})?")

ChooseBest = Callable[[Collection[int]], int | None]


def no_best(steps: Collection[int]) -> None:
    """Chooses none of the steps."""


class CheckpointFolder:
    """The checkpoints in the folder ``path``, of which pruning leaves the newest ``keep`` and what ``best`` chooses.

    ``best`` is given the steps that are there and returns one, or None; OSError or ValueError puts pruning off.
    """

    def __init__(self, path: Path, keep: int, best: ChooseBest = no_best) -> None:
        self.path = path
        self._keep = keep
        self._best = best
        self._told: set[str] = set()

    def finished(self) -> dict[int, Path]:
        """Step -> folder of every checkpoint that has a manifest."""
        return {step: path for step, path in self._steps().items() if (path / MANIFEST_NAME).is_file()}

    def unfinished(self) -> dict[int, Path]:
        """Step -> whatever else has the name of a checkpoint: no save leaves that, so something happened to it."""
        finished = self.finished()
        return {step: path for step, path in self._steps().items() if step not in finished}

    def prepare(self, step: int, num_bytes: int) -> Path:
        """Returns a new folder for a checkpoint of ``num_bytes``.

        Raises:
            ValueError: the folder holds a later step (of another run).
            OSError: there is no room for it, or the folder cannot be made.
        """
        later = max(self.finished(), default=step)
        if later > step:
            # keeping the newest would delete this run's, and a resume would take the other run's
            raise ValueError(f"{self.path} holds step {later} of another run; move it away or set run.output_dir")
        self.remove_leftovers()
        self.path.mkdir(parents=True, exist_ok=True)
        fresh = self._free_name(step, "tmp-new")
        num_bytes += _SMALL_FILES_BYTES
        if not has_space(fresh, num_bytes):
            raise OSError(errno.ENOSPC, f"{space_report(fresh, num_bytes)}; make room or lower run.keep_checkpoints")
        fresh.mkdir()
        return fresh

    def publish(self, fresh: Path, step: int, manifest: str) -> Path:
        """Returns the checkpoint's folder once all of it is on disk under its final name and older ones are pruned."""
        final = self._name(step)
        with new_file(fresh / MANIFEST_NAME) as file:
            file.write(manifest.encode())
            file.flush()
            os.fsync(file.fileno())
        flush_to_disk(fresh)
        replaced = self._retire(final) if os.path.lexists(final) else None
        try:
            fresh.rename(final)
        except OSError:
            if replaced is not None:
                replaced.rename(final)
            raise
        flush_to_disk(self.path)
        try:
            self._prune()
        except (OSError, ValueError) as error:  # the checkpoint is written, whatever becomes of the older ones
            self._tell(self.path, error)
        return final

    def discard(self, fresh: Path) -> None:
        """Removes a checkpoint that could not be finished, as far as possible: the next save tries again."""
        self._remove(fresh)

    def remove_leftovers(self) -> None:
        """Removes what killed saves and failed deletions left behind, as far as possible."""
        if self.path.is_dir():
            for path in sorted(self.path.iterdir()):
                if _LEFTOVER.fullmatch(path.name):
                    self._remove(path)

    def _prune(self) -> None:
        finished = self.finished()
        kept = {*sorted(finished)[-self._keep :], self._best(finished)}
        for step in sorted(finished.keys() - kept):
            try:
                self._retire(finished[step])
            except OSError as error:
                self._tell(finished[step], error)
        self.remove_leftovers()

    def _retire(self, path: Path) -> Path:
        """Takes a checkpoint, or the link to one, out of sight and returns where it is."""
        step = int(path.name.removeprefix("step_"))
        retired = self._free_name(step, "tmp-old")
        path.rename(retired)
        return retired

    def _remove(self, path: Path) -> None:
        failures: list[OSError] = []

        def note(_function: Any, _path: str, failure: Any) -> None:
            failures.append(failure[1])

        try:
            if path.is_symlink() or not path.is_dir():
                path.unlink()  # the user's link goes, what it points at is the user's
            else:
                shutil.rmtree(path, onerror=note)
        except OSError as error:
            failures.append(error)
        if failures:
            self._tell(path, failures[0])

    def _tell(self, path: Path, error: Exception) -> None:
        if path.name not in self._told:
            self._told.add(path.name)
            _LOG.warning("%s cannot be removed now: %s; it is tried again with every later checkpoint", path, error)

    def _steps(self) -> dict[int, Path]:
        paths = sorted(self.path.iterdir()) if self.path.is_dir() else []
        matches = [(path, _STEP.fullmatch(path.name)) for path in paths]
        return {int(match[1]): path for path, match in matches if match and path == self._name(int(match[1]))}

    def _name(self, step: int) -> Path:
        return self.path / f"step_{step:08d}"

    def _free_name(self, step: int, kind: str) -> Path:
        path = self.path / f"step_{step:08d}.{kind}"
        return path.with_name(f"{path.name}-{secrets.token_hex(4)}") if os.path.lexists(path) else path


def new_file(path: Path) -> Any:
    """Returns a binary file that was not there before, open for writing; a link that stands there is not followed.

    Raises:
        FileExistsError: something stands there.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o666), "wb")

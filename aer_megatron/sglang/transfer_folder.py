"""The folder through which a run hands weights to servers: one of its own inside a folder that others may use, too.

    sglang.transfer_dir/
        aer-0123456789abcdef/     made by this launch, under its random name
            run.json              whose it is; locked by the kernel while that process lives
            version-7/            config.json and safetensors files

Only what the run made is ever removed, file by file and by the names it writes: no other entry is touched, no link is
followed, a folder that holds something else stays. What a killed launch of the same run left is removed by the next one
if it can be told for sure: by its name, its owner, its content, and because nobody holds its lock any more.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import stat
from pathlib import Path

_LOG = logging.getLogger(__name__)
_MARKER = "run.json"
_MAX_MARKER_BYTES = 10_000
_RUN_FOLDER = re.compile(r"aer-[0-9a-f]{16}", re.ASCII)
_VERSION_FOLDER = re.compile(r"version-\d+", re.ASCII)
_OWN_FILES = re.compile(r"config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json", re.ASCII)


class TransferFolder:
    """This launch's folder under ``parent``; ``open`` makes it, ``close`` removes it.

    Args:
        parent: may exist and hold other things.
        run_id: of this launch, "aer-" and 16 hexadecimal digits.
        owner: what tells this run from others that use ``parent``: its output folder, absolute.
    """

    def __init__(self, parent: Path, *, run_id: str, owner: str) -> None:
        self._parent = parent.absolute()
        self._path = self._parent / run_id
        self._owner = owner
        self._lock = -1  # descriptor of the marker, open as long as the folder is in use
        self._made: list[Path] = []  # folders above it that were not there, the innermost first

    def open(self) -> None:
        """Makes the folder, once, and removes what killed launches of this run left beside it.

        Raises:
            RuntimeError: it cannot be made; the message names the option.
        """
        if self._lock >= 0:
            return
        try:
            self._make_parents()
            self._path.mkdir()
            self._lock = os.open(self._path / _MARKER, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            _try_lock(self._lock)
            os.write(self._lock, json.dumps({"output_dir": self._owner, "pid": os.getpid()}).encode())
        except OSError as error:
            raise RuntimeError(
                f"sglang.transfer_dir={str(self._parent)!r} cannot take a folder of this run: {error}; name a folder "
                "that this process may write to and the servers can read"
            ) from None
        for other in self._parent.iterdir():
            if other != self._path and _is_left_over(other, self._owner):
                _LOG.info("removing %s, which a killed launch of this run left", other)
                _remove_run_folder(other)

    def version_path(self, version: int) -> Path:
        """Returns the folder of a policy version."""
        return self._path / f"version-{version}"

    def make_version(self, version: int) -> Path:
        """Returns the folder of a policy version, new and empty.

        Raises:
            OSError: it cannot be made, or something else lies there.
        """
        target = self.version_path(version)
        _remove_version(target)
        target.mkdir()
        return target

    def keep_only(self, version: int) -> None:
        """Removes the folders of all other versions."""
        for other in self._path.iterdir():
            if other != self.version_path(version):
                _remove_version(other)

    def close(self) -> None:
        """Removes the folder, and those above it that ``open`` made, as far as they are empty; twice is harmless."""
        if self._lock < 0:
            return
        _remove_run_folder(self._path)
        for folder in self._made:
            _remove_if_empty(folder)
        os.close(self._lock)
        self._lock = -1

    def _make_parents(self) -> None:
        missing = []
        folder = self._parent
        while not folder.exists():
            missing.append(folder)
            folder = folder.parent
        self._parent.mkdir(parents=True, exist_ok=True)
        self._made = missing


def _try_lock(descriptor: int) -> bool:
    """Returns whether this process holds the lock of a marker; False, too, where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_left_over(folder: Path, owner: str) -> bool:
    """Returns whether a folder is surely one that a launch of this run made which is no longer alive."""
    if not _RUN_FOLDER.fullmatch(folder.name) or not _is_folder(folder):
        return False
    try:
        marker = os.open(folder / _MARKER, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        state = os.fstat(marker)
        if not stat.S_ISREG(state.st_mode) or state.st_uid != os.getuid() or not _try_lock(marker):
            return False
        table = json.loads(os.read(marker, _MAX_MARKER_BYTES))
        return isinstance(table, dict) and table.get("output_dir") == owner
    except (OSError, ValueError, RecursionError):
        return False
    finally:
        os.close(marker)


def _remove_run_folder(folder: Path) -> None:
    for entry in folder.iterdir() if _is_folder(folder) else ():
        _remove_version(entry)
    (folder / _MARKER).unlink(missing_ok=True)
    _remove_if_empty(folder)


def _remove_version(folder: Path) -> None:
    """Removes the files that this program writes from a version's folder, and the folder unless more is in it."""
    if not _VERSION_FOLDER.fullmatch(folder.name) or not _is_folder(folder):
        return
    try:
        for file in folder.iterdir():
            if _OWN_FILES.fullmatch(file.name) and stat.S_ISREG(file.lstat().st_mode):
                file.unlink()
    except OSError as error:  # no reason to end a run: the next version has a folder of its own
        _LOG.warning("%s stays: %s", folder, error)
    _remove_if_empty(folder)


def _is_folder(path: Path) -> bool:
    """Returns whether a path is a folder, and no link to one."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:  # it holds something of others, or has gone
        _LOG.debug("%s stays", folder)

"""Files of a run that must be whole whatever happens: lines that are appended, texts that are replaced.

A name that others can guess is opened only where nothing stands under it: a link planted there is not followed.

This file does NOT know what the lines say.
"""

from __future__ import annotations

import logging
import os
import secrets
from pathlib import Path

from aer_megatron.files.disk_space import lacks_space, space_report

_LOG = logging.getLogger(__name__)
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class LineFile:
    """Appends whole lines to ``path``, which is made with the first one.

    A line that finds no room on the disk is taken back and waits in memory: every later ``append`` tries it again, in
    order. So a full disk costs no line of a run that goes on, and no torn line stays in the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[bytes] = []

    def append(self, line: str) -> None:
        """Hands the line, without its end, to the operating system before it returns, if there is room.

        Raises:
            OSError: it cannot be written for another reason than room.
        """
        self._waiting.append(line.encode("utf-8") + b"\n")
        error = self._write_waiting()
        count = len(self._waiting)
        if error is not None and count & (count - 1) == 0:  # 1, 2, 4, ...: heard, but not with every step
            _LOG.warning(
                "%s; %s: %d line(s) wait in memory and are written once there is room",
                error,
                space_report(self.path, sum(map(len, self._waiting))),
                count,
            )

    def close(self) -> None:
        """Writes what still waits. Raises RuntimeError, with the lines lost, where there is no room for it."""
        error = self._write_waiting()
        if error is not None:
            count, needed = len(self._waiting), sum(map(len, self._waiting))
            self._waiting.clear()
            raise RuntimeError(f"the last {count} line(s) are lost: {error}; {space_report(self.path, needed)}")

    def _write_waiting(self) -> OSError | None:
        """Returns None once nothing waits, or what a lack of room raised; the file then ends where it did before."""
        if not self._waiting:
            return None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            end = os.fstat(descriptor).st_size
            try:
                write_all(descriptor, b"".join(self._waiting))
            except OSError as error:
                os.ftruncate(descriptor, end)
                if not lacks_space(error):
                    raise
                return error
        finally:
            os.close(descriptor)
        self._waiting.clear()
        return None


def write_all(descriptor: int, content: bytes) -> None:
    """Writes all bytes to the operating system; a full disk may take some of them before it raises."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def replace_file(path: Path, text: str, *, mode: int = 0o666) -> None:
    """Writes ``path`` anew in one atomic rename; ``mode`` (less the umask) is that of the file afterwards.

    Raises:
        OSError: it cannot be written; what stood at ``path`` stays.
    """
    beside, descriptor = _new_file_beside(path, mode)
    try:
        try:
            write_all(descriptor, text.encode("utf-8"))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _new_file_beside(path: Path, mode: int) -> tuple[Path, int]:
    """Returns (name, descriptor) of a file that was not there before; what a killed process left is cleared away."""
    beside = path.with_name(f"{path.name}.new")
    while True:
        try:
            beside.unlink(missing_ok=True)  # a link, too: the link, not what it points at
            return beside, os.open(beside, _NEW_FILE, mode)
        except (FileExistsError, IsADirectoryError, PermissionError):
            if beside.name != f"{path.name}.new":
                raise
            beside = path.with_name(f"{path.name}.new-{secrets.token_hex(8)}")

"""One run per folder: a lock that the kernel holds for the process and releases with it, however it ends.

``run.lock`` stays in the folder and means nothing by itself: it says who holds the lock while somebody does. Nothing
else in the folder may be touched before the lock is taken.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
import warnings
import weakref
from pathlib import Path
from types import TracebackType
from typing import Any, Self

LOCK_FILE = "run.lock"

_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
_LONGEST_HOLDER = 4096  # bytes


class RunLock:
    """The lock on ``path``, whose folder is made if it is missing; a context manager that releases it.

    Args:
        path: the lock file, in the folder or, where that is replaced as a whole, beside it.
        option: what it protects, for the message: ``run.output_dir='runs/a'``.
        job: the scheduler's name of this job, told to a run that is refused.

    Raises:
        ValueError: another process holds it; the message names its host, process, job and start.
        OSError: the lock file cannot be made.
    """

    def __init__(self, path: Path, *, option: str, job: str | None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # never inherited: a server that outlives the run must not keep its folder locked
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        own = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _close_copy(own()))
        try:
            self._take(path, option)
            holder = {"host": socket.gethostname(), "pid": os.getpid(), "job": job, "since": time.strftime("%F %T %z")}
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, json.dumps(holder).encode() + b"\n", 0)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Releases the lock; a second call does nothing."""
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _take(self, path: Path, option: str) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{option} is in use by another run ({_holder(self._file)}); wait for its end, end it, or choose "
                "another folder"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            warnings.warn(
                f"{path}: this file system has no locks ({error.strerror}), so nothing keeps a second run out",
                stacklevel=3,
            )


def held_by(path: Path) -> str | None:
    """Returns who holds the lock on ``path``, None where nobody does; makes and changes nothing."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _holder(file)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    finally:
        os.close(file)
    return None


def _close_copy(lock: RunLock | None) -> None:
    """In a forked child: its copy of the descriptor would keep the lock beyond the end of the run."""
    if lock is not None:
        lock.release()


def _holder(file: int) -> str:
    try:
        holder: Any = json.loads(os.pread(file, _LONGEST_HOLDER, 0))
    except (ValueError, RecursionError, OSError):
        holder = None
    if not isinstance(holder, dict):  # it has the lock and has not written its name yet
        return "which has not said its name"
    return ", ".join(f"{name} {str(holder[name])[:80]}" for name in ("host", "pid", "job", "since") if holder.get(name))

"""Room on a disk: whether an error is the lack of it, and how much there is.

This file does NOT write anything.
"""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

# a full disk, a quota that is used up, a file beyond the limit of the process or of the file system
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def lacks_space(error: BaseException) -> bool:
    """Returns whether ``error`` says that a file found no room."""
    return isinstance(error, OSError) and error.errno in _NO_SPACE


def free_bytes(path: Path) -> int:
    """Returns what an ordinary user can still write on the disk of ``path``, which need not exist."""
    return shutil.disk_usage(_existing(path)).free


def space_report(path: Path, num_bytes: int) -> str:
    """Returns "needs 1.20 GB, /data has 0.30 GB free" for a file or folder of ``num_bytes`` at ``path``."""
    return f"{path} needs {_size(num_bytes)}, {_existing(path.parent)} has {_size(free_bytes(path.parent))} free"


def has_space(target: Path, num_bytes: int) -> bool:
    """Returns whether ``num_bytes`` fit the disk of ``target``, which need not exist."""
    return free_bytes(target.parent) >= num_bytes


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _size(num_bytes: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6)):
        if num_bytes >= factor / 100:
            return f"{num_bytes / factor:.2f} {unit}"
    return f"{num_bytes:,} bytes"

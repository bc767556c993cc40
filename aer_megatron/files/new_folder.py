"""A folder that appears under its name when all of it is on disk, or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Gives a temporary folder that becomes ``target`` when the block ends, or is removed if it raises.

    Raises ValueError if ``target`` exists. Files are flushed to disk before the rename.
    """
    if target.exists():
        raise ValueError(f"{target} exists already; choose another folder or remove it first")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    work.mkdir()
    try:
        yield work
        for file in work.rglob("*"):
            flush_to_disk(file)
        flush_to_disk(work)
        work.rename(target)
        flush_to_disk(target.parent)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def remove_folder(folder: Path) -> None:
    """Takes the folder out of sight in one rename, then removes it: nobody sees it half deleted."""
    aside = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def flush_to_disk(path: Path) -> None:
    """Waits until the file's bytes, or the folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

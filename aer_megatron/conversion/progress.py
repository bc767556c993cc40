"""A progress bar of bytes on standard error, drawn where that is a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from aer_megatron.convert.hf_writer import Advance


@contextmanager
def progress_bar(what: str, num_bytes: int) -> Iterator[Advance]:
    """Gives a function that is told the bytes done since its last call."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=num_bytes)
        yield lambda done: progress.advance(task, done)

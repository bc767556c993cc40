"""Standard output and error that may go away: a pager that ends, a lost ssh connection, a full disk.

A run must not end because nobody reads it. ``keep_standard_streams`` puts a stream in the place of each that drops what
cannot be written: Python's own raises at the next line, and once more while the interpreter exits (exit code 120).

Command lines call it first. This file holds the one function that speaks to the user beside the display (``say``).
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from typing import Any

_WRITE_TIMEOUT_S = 2.0  # for a terminal or pipe that was made non-blocking by a program that shares it
_GONE = frozenset({errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ECONNRESET, errno.ESTALE})


class _DroppingFile(io.RawIOBase):
    """A descriptor whose writes never fail: what it does not take is dropped, all of it once its reader is gone."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._gone = False

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        while len(rest) and not self._gone:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:
                if not select.select([], [self._descriptor], [], _WRITE_TIMEOUT_S)[1]:
                    break
            except OSError as error:  # a full disk may have room for the next text
                self._gone = error.errno in _GONE
                break
        return size


def keep_standard_streams() -> None:
    """Replaces ``sys.stdout`` and ``sys.stderr`` by streams that cannot fail; a second call does nothing.

    Text that the terminal's encoding lacks is escaped rather than an error. A standard descriptor that is closed
    becomes the null device, so that no file of the run is opened under its number and written to by a stray print.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is not None and not _is_own(stream, descriptor):
            continue  # replaced by the caller, a test for instance
        if stream is not None:
            _flush(stream)
        raw: Any = _DroppingFile(descriptor)
        encoding = getattr(stream, "encoding", None) or "utf-8"
        setattr(sys, name, io.TextIOWrapper(raw, encoding, "backslashreplace", line_buffering=True))


def say(text: str, *, error: bool = False) -> None:
    """Writes one message to standard output, or standard error; it is out when the call returns."""
    print(text, file=sys.stderr if error else sys.stdout, flush=True)


def _is_own(stream: Any, descriptor: int) -> bool:
    """Returns whether ``stream`` is the interpreter's own one of that descriptor."""
    return stream in (sys.__stdout__, sys.__stderr__) and stream.fileno() == descriptor


def _flush(stream: Any) -> None:
    try:
        stream.flush()
    except OSError:  # its text is lost, which is what this module is about
        return

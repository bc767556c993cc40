"""Files of others, read up to a limit: what is larger than it can be is not read."""

from __future__ import annotations

from pathlib import Path


def read_bounded(path: Path, max_bytes: int, *, what: str, remedy: str) -> bytes:
    """Returns the bytes of a file.

    Raises:
        ValueError: it cannot be read, or has more than ``max_bytes``; names the file and ends in ``remedy``.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(max_bytes + 1)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; {remedy}") from None
    if len(raw) > max_bytes:
        raise ValueError(f"{path} is larger than {max_bytes} bytes, too large for {what}; {remedy}")
    return raw

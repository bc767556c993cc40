"""What a fuzz target is: a reader with its valid inputs, its mutations and the exceptions that it documents.

``run`` returns where an input is refused or read as it should be, and raises ``WrongAccept`` where it was read as
something else. Anything that leaves ``run`` but a documented exception is a finding.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


class WrongAccept(Exception):
    """An input was accepted with a meaning that it must not have."""


@dataclass(frozen=True, slots=True)
class Target:
    """``seeds()`` are valid inputs; ``run(valid, data, folder)`` reads ``data``, which was made of ``valid``."""

    name: str
    seeds: Callable[[], list[bytes]]
    mutate: Callable[[bytes, random.Random], bytes]
    run: Callable[[bytes, bytes, Path], None]
    refusals: tuple[type[Exception], ...] = (ValueError,)
    share: int = 10  # of all inputs, beside the other targets'


def target(
    name: str,
    seeds: Callable[[], list[bytes]],
    mutate: Callable[[bytes, random.Random], bytes],
    run: Callable[[bytes, bytes, Path], None],
    *,
    refusals: tuple[type[Exception], ...] = (ValueError,),
    share: int = 10,
) -> Target:
    """Returns a target whose seeds are made once per process."""
    return Target(name, functools.cache(seeds), mutate, run, refusals, share)

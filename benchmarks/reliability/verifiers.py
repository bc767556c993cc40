"""Verifiers of the reliability runs; each is called in a worker process with (text, prompt).

Right and wrong come from a checksum of the text: about a third of all answers is right, whatever the policy, and the
same text is judged alike in every run.
"""

from __future__ import annotations

import random
import time
import zlib
from typing import Any

_SLOW_ONE_IN = 20_000
_chance = random.Random()  # not seeded: every worker process has moments of its own


def checksum(text: str, prompt: Any) -> bool:
    """Returns the verdict after a few milliseconds, in which a kill finds the worker busy."""
    time.sleep(0.004)
    return zlib.crc32(text.encode()) % 3 == 0


def sometimes_slow(text: str, prompt: Any) -> bool:
    """Returns the verdict; one call in 20,000 lasts beyond any limit that a run sets.

    The others take 20 ms: hours of training leave the machine half idle.
    """
    time.sleep(0.02)
    if _chance.randrange(_SLOW_ONE_IN) == 0:
        time.sleep(3600)
    return zlib.crc32(text.encode()) % 3 == 0

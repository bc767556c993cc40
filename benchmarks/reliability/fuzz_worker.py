"""The process that tries inputs: one target, one range of indices, everything written down before it can go wrong.

The parent reads the index and the start of the current input from a few shared bytes, so that a process that hangs or
dies is known to do so on that input.
"""

from __future__ import annotations

import base64
import json
import mmap
import os
import random
import resource
import struct
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.reliability.fuzz_target import Target, WrongAccept
from benchmarks.reliability.fuzz_targets import TARGETS

SHARED = struct.Struct("<qdd")  # index, when it began (CLOCK_MONOTONIC), CPU seconds then
_MAX_KEPT_PER_KIND = 3


@dataclass(frozen=True, slots=True)
class Batch:
    """Inputs ``start`` to ``stop`` - 1 of a target."""

    target: str
    start: int
    stop: int


def make_input(target: Target, seed: int, index: int) -> tuple[bytes, bytes]:
    """Returns (valid input, what became of it): the same for the same target, seed and index."""
    chance = random.Random(f"{seed}:{target.name}:{index}")
    valid = chance.choice(target.seeds())
    return valid, target.mutate(valid, chance)


def judge(target: Target, valid: bytes, data: bytes, folder: Path) -> tuple[str, str]:
    """Returns (outcome, what happened): "value", "refused", or a finding's kind, "raised" or "accepted"."""
    try:
        target.run(valid, data, folder)
    except WrongAccept as error:
        return "accepted", str(error)
    except target.refusals as error:
        return ("refused", "") if str(error).strip() else ("raised", f"{type(error).__name__} without a message")
    except Exception as error:
        return "raised", f"{type(error).__name__}: {str(error)[:300]}\n{_where(error)}"
    return "value", ""


def work(batch: Batch, seed: int, shared_file: Path, report: Path, limits: tuple[float, int]) -> None:
    """Tries a batch; appends findings and a last line with the counts to ``report``, as JSON lines."""
    seconds, memory_bytes = limits
    target = TARGETS[batch.target]
    target.seeds()  # imports and valid inputs count for nobody's time or memory
    soft = _address_space() + memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (soft, resource.RLIM_INFINITY))
    counts: dict[str, int] = {}
    kinds: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as name, shared_file.open("r+b") as file:
        shared = mmap.mmap(file.fileno(), SHARED.size)
        for index in range(batch.start, batch.stop):
            valid, data = make_input(target, seed, index)
            began = time.process_time()
            SHARED.pack_into(shared, 0, index, time.monotonic(), began)
            outcome, text = judge(target, valid, data, Path(name))
            if (took := time.process_time() - began) > seconds:
                outcome, text = "slow", f"{took:.1f} s of CPU"
            counts[outcome] = counts.get(outcome, 0) + 1
            if outcome in ("value", "refused"):
                continue
            kind = signature(outcome, text)
            kinds[kind] = kinds.get(kind, 0) + 1
            if kinds[kind] <= _MAX_KEPT_PER_KIND:
                _append(report, finding(batch.target, seed, index, outcome, text, data))
        SHARED.pack_into(shared, 0, -1, time.monotonic(), 0.0)
    _append(report, {"counts": counts, "kinds": kinds})


def finding(target: str, seed: int, index: int, outcome: str, text: str, data: bytes) -> dict[str, Any]:
    """Returns the record of one finding."""
    return {
        "target": target, "seed": seed, "index": index, "outcome": outcome, "what": text,
        "kind": signature(outcome, text), "num_bytes": len(data), "input": base64.b64encode(data[:200_000]).decode(),
    }  # fmt: skip


def signature(outcome: str, text: str) -> str:
    """Returns what findings of one cause share: the kind of exception and the line that raised it."""
    lines = text.splitlines() or [""]
    if outcome == "raised":
        return f"{lines[0].partition(':')[0]} {lines[-1]}"
    return f"{outcome} {lines[0].partition(':')[0][:80]}" if outcome == "accepted" else outcome


def _where(error: BaseException) -> str:
    """Returns the last place in this project that the exception came through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "aer_megatron" in frame.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "outside"


def _append(report: Path, row: dict[str, Any]) -> None:
    with report.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def main() -> int:
    """Reads one batch from the command line; see fuzz.py."""
    given = json.loads(sys.argv[1])
    batch = Batch(given["target"], given["start"], given["stop"])
    work(batch, given["seed"], Path(given["shared"]), Path(given["report"]), (given["seconds"], given["memory"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())

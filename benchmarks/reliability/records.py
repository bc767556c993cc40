"""The records of a harness, and what they say of the machine and the code that made them."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from aer_megatron.report.writer import source_commit


class Records:
    """records.jsonl of a folder: one JSON object a line, appended; a half-written last line is dropped."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "records.jsonl"
        self.rows: list[dict[str, Any]] = []
        if self.path.exists():
            whole = self.path.read_bytes()[: self.path.read_bytes().rfind(b"\n") + 1]
            self.path.write_bytes(whole)
            self.rows = [json.loads(line) for line in whole.splitlines()]

    def add(self, kind: str, **fields: Any) -> None:
        row = {"kind": kind, "time": time.time(), **fields}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)


def last_step(metrics: Path) -> int:
    """Returns the last whole step of a metrics.jsonl, -1 where there is none; reads only the file's end."""
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, metrics.stat().st_size - 65536))
            lines = file.read().split(b"\n")[:-1]
        return int(json.loads(lines[-1])["step"]) if lines else -1
    except (OSError, ValueError, KeyError):
        return -1


def load() -> float:
    """Returns the load of the last minute."""
    return round(os.getloadavg()[0], 2)


def machine() -> str:
    """Returns cores and memory, in words."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores, {memory:.0f} GiB"


def source_commit_name() -> str:
    """Returns the commit of the code that runs, with a + where files were changed."""
    found = source_commit(Path(__file__))
    return "unknown" if found is None else found["commit"][:12] + ("+" if found["modified"] else "")

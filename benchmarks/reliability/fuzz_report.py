"""The fuzz run's table, and the inputs that are kept: what was found once is tried ever after."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.reliability.records import machine, source_commit_name

SEEDS = Path(__file__).with_name("seeds")
_FINE = ("value", "refused", "uncounted")


def kept_inputs() -> Iterator[tuple[str, str, bytes]]:
    """Yields (target, what was wrong with it once, input) of every input in seeds/."""
    for path in sorted(SEEDS.glob("*.jsonl")):
        for line in path.read_text("utf-8").splitlines():
            row = json.loads(line)
            yield path.stem, row["was"], base64.b64decode(row["input"])


def keep(folder: Path, *, longest: int = 20_000) -> int:
    """Returns how many inputs of a run's findings were added to seeds/: one of a kind, short ones."""
    known = {(name, was) for name, was, _ in kept_inputs()}
    added = 0
    for path in sorted((folder / "findings").glob("*.json")):
        row = json.loads(path.read_text("utf-8"))
        key = (row["target"], row["kind"])
        if key in known or row["num_bytes"] > longest:
            continue
        known.add(key)
        SEEDS.mkdir(exist_ok=True)
        with (SEEDS / f"{row['target']}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"was": row["kind"], "input": row["input"]}) + "\n")
        added += 1
    return added


def write_report(folder: Path, state: Mapping[str, Any], num_inputs: int) -> int:
    """Returns 0 where nothing was found, 1 elsewhere; writes fuzz.md and result.json into ``folder``."""
    found = sum(count for table in state["counts"].values() for name, count in table.items() if name not in _FINE)
    result = {
        "commit": source_commit_name(),
        "machine": machine(),
        "load": float(np.median(state["loads"] or [0.0])),
        "inputs": sum(sum(table.values()) for table in state["counts"].values()),
        "wanted": num_inputs,
        "seed": state["seed"],
        "seconds": state["seconds"],
        "found": found,
        "counts": state["counts"],
        "kinds": state["kinds"],
    }
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = page(result)
    (folder / "fuzz.md").write_text(text, encoding="utf-8")
    print(text)
    return int(bool(found))


def page(result: Mapping[str, Any]) -> str:
    """Returns the Markdown text of a result."""
    lines = [
        f"## Fuzz: {result['inputs']:,} inputs, {result['found']} findings",
        "",
        f"`python -m benchmarks.reliability.fuzz --out FOLDER --inputs {result['wanted']} --seed {result['seed']}`",
        "",
        f"- commit {result['commit']}, {result['machine']}, load {result['load']:.1f}; {result['seconds']:.0f} s",
        "- read: accepted as what it says; refused: with the documented exception and a message; findings: crash,",
        "  hang, more than 5 s, another exception, accepted with another meaning",
        "",
        "| reader | inputs | read | refused | findings |",
        "|---|---|---|---|---|",
    ]
    for name, table in sorted(result["counts"].items()):
        bad = {kind: count for kind, count in table.items() if kind not in _FINE}
        words = ", ".join(f"{count} {kind}" for kind, count in sorted(bad.items())) or "0"
        total = sum(table.values())
        lines.append(f"| {name} | {total:,} | {table.get('value', 0):,} | {table.get('refused', 0):,} | {words} |")
    if result["kinds"]:
        lines += ["", "Kinds of findings:", ""]
        lines += [f"- {kind} ({count})" for kind, count in sorted(result["kinds"].items())]
    return "\n".join([*lines, ""])

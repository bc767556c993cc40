"""Writes FOLDER/report.md from what tools/gpu_acceptance.sh left there: python tools/gpu_report.py FOLDER"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(row) + " |" for row in rows)]


def number(value: float | None, form: str, scale: float = 1.0) -> str:
    return "-" if value is None else format(value / scale, form)


def ratio(one: float | None, two: float | None) -> str:
    return "-" if not one or not two else f"{one / two:.2f}"


def records_of(folder: Path, what: str) -> list[tuple[str, dict[str, Any]]]:
    """Returns (file's name, record) of every benchmark record of a kind."""
    found = []
    for file in sorted(folder.glob("*.json")):
        found += [(file.stem, record) for record in json.loads(file.read_text()) if record.get("what") == what]
    return found


def parts_section(folder: Path) -> list[str]:
    lines = [line.split() for line in (folder / "parts.txt").read_text().splitlines()]
    rows = [[name, "passed" if code == "0" else f"FAILED ({code}), {name}.log", f"{seconds} s"]
            for name, code, seconds in lines]  # fmt: skip
    return ["## Parts", "", *table(["part", "result", "time"], rows)]


def head_section(folder: Path) -> list[str]:
    records = [record for _, record in records_of(folder, "head")]
    best = next((record for record in records if record["form"] == "fused" and "seconds" in record), {})
    rows = [
        [record["form"], number(record.get("seconds"), ".2f", 1e-3), number(record.get("added_bytes"), ".2f", 1e9),
         ratio(record.get("seconds"), best.get("seconds")), ratio(record.get("added_bytes"), best.get("added_bytes")),
         record.get("error", "")]
        for record in records
    ]  # fmt: skip
    names = ["form", "ms", "added GB", "time / fused", "memory / fused", "error"]
    return ["## Entropy head, forward and backward", "", *table(names, rows)]


def update_section(folder: Path) -> list[str]:
    found = records_of(folder, "update")
    bf16 = {(r["config"], r["layers"]): r["seconds"] for name, r in found if name.startswith("update-bf16")}
    rows = [
        [name, str(r["layers"]), number(r["seconds"], ".3f"), number(r["tokens_per_second"], ",.0f"),
         number(r["mfu"], ".1%"), ratio(bf16.get((r["config"], r["layers"])), r["seconds"]),
         number(r["peak_bytes"], ".1f", 1e9), number(r["planned_peak_bytes"], ".1f", 1e9),
         ratio(r["peak_bytes"], r["planned_peak_bytes"])]
        for name, r in found
    ]  # fmt: skip
    names = ["run", "layers", "s", "tokens/s", "MFU", "bf16 time / this", "peak GB", "planned GB", "peak / plan"]
    return ["## Policy update", "", *table(names, rows)]


def runs_section(folder: Path) -> list[str]:
    """The median time of each phase over the steps of whole runs, weight transfer among them; step 0 is left out."""
    rows = []
    for file in sorted(folder.glob("*/metrics.jsonl")):
        steps = [json.loads(line) for line in file.read_text().splitlines()][1:]
        if steps:
            keys = sorted(key for key in steps[0] if key.startswith("time/") and key.endswith("_s"))
            medians = {key: statistics.median(step.get(key, 0.0) for step in steps) for key in keys}
            text = ", ".join(f"{key[5:-2]} {value:.3f}" for key, value in medians.items())
            difference = max(step.get("rollout/logprob_diff_max", float("nan")) for step in steps)
            rows.append([file.parent.name, str(len(steps) + 1), text, f"{difference:.2e}"])
    return ["## Whole runs", "", *table(["run", "steps", "median seconds", "largest rollout/train difference"], rows)]


def parity_section(folder: Path) -> list[str]:
    file = folder / "fp8-parity.log"
    text = file.read_text(errors="replace").rstrip() if file.exists() else "not run"
    return ["## FP8 against bf16", "", "```", text[-6000:], "```"]


def main(arguments: list[str]) -> int:
    """Returns the exit code; writes report.md."""
    if len(arguments) != 1 or not (Path(arguments[0]) / "parts.txt").is_file():
        print("usage: gpu_report.py FOLDER, with what gpu_acceptance.sh left there", file=sys.stderr)
        return 2
    folder = Path(arguments[0])
    sections = (parts_section, head_section, update_section, runs_section, parity_section)
    lines = ["# GPU acceptance", ""]
    gpus = folder / "nvidia-smi.txt"
    if gpus.exists():
        lines += ["```", gpus.read_text().rstrip(), "```", ""]
    for section in sections:
        lines += [*section(folder), ""]
    (folder / "report.md").write_text("\n".join(lines), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

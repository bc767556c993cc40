"""Measures conversion against copying the same files, both until the bytes are on disk, and its peak memory.

    python -m benchmarks.bench_convert --scratch DIR [--sizes qwen3-4b qwen3-8b] [--rounds 2]

Per size: makes a random checkpoint (tools/make_random_checkpoint.py), then alternates, --rounds times, `cp -r` + `sync`
of the Hugging Face folder, HF -> Megatron, Megatron -> HF; the last pair is compared bit for bit. Peak memory is
the converter's maximum resident set, mapped file pages included. Needs room for three copies. Writes
benchmarks/results/convert.json and convert.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
GB = 10**9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="folder on the disk to be measured")
    parser.add_argument("--sizes", nargs="+", default=["qwen3-4b", "qwen3-8b"], help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=2, help="default %(default)s")
    options = parser.parse_args()
    options.scratch.mkdir(parents=True, exist_ok=True)
    file = RESULTS / "convert.json"
    rows: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["sizes"] if file.is_file() else {}
    for size in options.sizes:
        with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
            rows[size] = measure(size, Path(scratch), options.rounds)
        write(file, rows)


def measure(size: str, scratch: Path, rounds: int) -> dict[str, Any]:
    """Returns seconds of every round, bytes and peak memory."""
    hf, megatron, back, copy = (scratch / name for name in ("hf", "megatron", "back", "copy"))
    _run(_tool("make_random_checkpoint", size, hf))
    num_bytes = sum(path.stat().st_size for path in hf.iterdir())
    seconds: dict[str, list[float]] = {"copy": [], "to_megatron": [], "to_hf": []}
    peaks: dict[str, int] = {"to_megatron": 0, "to_hf": 0}
    for _ in range(rounds):
        for folder in (megatron, back):
            shutil.rmtree(folder, ignore_errors=True)
        seconds["copy"].append(_run(["bash", "-c", f"cp -r '{hf}' '{copy}' && sync '{copy}'/*"])[0])
        shutil.rmtree(copy)
        for what, command in (
            ("to_megatron", _tool("convert_hf_to_megatron", hf, megatron)),
            ("to_hf", _tool("convert_megatron_to_hf", megatron, back)),
        ):
            took, peak = _run(command)
            seconds[what].append(took)
            peaks[what] = max(peaks[what], peak)
            print(size, what, f"{took:.1f} s", f"{peak / GB:.2f} GB", flush=True)
    _compare(hf, back)
    return {"num_bytes": num_bytes, "seconds": seconds, "peak_bytes": peaks}


def _tool(name: str, *arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)]


def _run(command: list[str]) -> tuple[float, int]:
    """(seconds, peak resident bytes) of a finished process. Raises RuntimeError if it fails."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with exit code {process.returncode}")
    return time.perf_counter() - started, usage.ru_maxrss * 1024


def _compare(left: Path, right: Path) -> None:
    from aer_megatron.convert import folders
    from aer_megatron.convert.hf_folder import HFFolder

    folder, arch = folders.checked_hf_folder(left, 1)
    again = HFFolder(right)
    folders.compare(
        folder.get, folders.hf_dtypes(folder, arch), ((name, again.get(name)) for name in again.names()), lambda _: None
    )


def write(file: Path, rows: dict[str, Any]) -> None:
    """Returns nothing; writes the table as JSON and as Markdown."""
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "load_average": os.getloadavg()[1]}
    file.write_text(json.dumps({**machine, "sizes": rows}, indent=1) + "\n", encoding="utf-8")
    lines = [
        "# Conversion against copying",
        "",
        "`python -m benchmarks.bench_convert --scratch DIR`: random bf16 weights, true shapes. Copying is `cp -r`",
        "and `sync` of every file; the converters flush every file as well. Rounds alternate; medians. Speed is the",
        "copy's seconds over the converter's, its start included. Peak memory is the maximum resident set, mapped file",
        f"pages included. The round trip is bit-exact. {os.cpu_count()} cores shared with other work (load average"
        f" {os.getloadavg()[1]:.0f}):",
        "ratios, not seconds, are what the table says.",
        "",
        "| model | GB | copy | HF -> Megatron | speed | peak | Megatron -> HF | speed | peak |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for size, row in rows.items():
        middle = {what: statistics.median(values) for what, values in row["seconds"].items()}
        cells = [size, f"{row['num_bytes'] / GB:.1f}", f"{middle['copy']:.0f} s"]
        for what in ("to_megatron", "to_hf"):
            cells.append(f"{middle[what]:.0f} s")
            cells.append(f"{middle['copy'] / middle[what]:.2f} x")
            cells.append(f"{row['peak_bytes'][what] / GB:.2f} GB")
        lines.append("| " + " | ".join(cells) + " |")
    file.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

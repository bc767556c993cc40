"""The result page out of the records of soak, chaos and fuzz runs.

    python -m benchmarks.reliability.results runs/reliability/{embedded,sync,async,fuzz,soak}

A folder with state.json and result.json is a chaos or a fuzz run, one with records.jsonl a soak. Writes reliability.md,
reliability.json (the machine-readable results) and reliability.png (the soak's picture) into benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.reliability import chaos_report, fuzz_report, soak_report
from benchmarks.reliability.records import Records
from tests.support.runs import ROOT

_TITLE = """\
# Reliability: kills, damaged inputs, hours

How to run them: docs/reliability.md. Seconds depend on what else the machine did; the load stands beside them.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    given = parser.parse_args(arguments)
    results: dict[str, Any] = {}
    parts = [_TITLE]
    for folder in given.folders:
        results[folder.name], part = read(folder)
        parts.append(part)
        if (folder / "soak.png").exists():
            shutil.copyfile(folder / "soak.png", given.out / "reliability.png")
            parts.append("![memory, descriptors and threads over the steps](reliability.png)\n")
    (given.out / "reliability.md").write_text("\n".join(parts), encoding="utf-8")
    (given.out / "reliability.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


def read(folder: Path) -> tuple[Any, str]:
    """Returns (machine-readable result, Markdown) of one run's folder.

    Raises:
        SystemExit: the folder holds no finished run.
    """
    if (folder / "records.jsonl").exists():
        rows = Records(folder).rows
        table = soak_report.growths(rows)
        return [asdict(item) for item in table], soak_report.page(rows, table)
    if not (folder / "result.json").exists():
        raise SystemExit(f"{folder} holds no result.json; let the run end, its command goes on where it was")
    result = json.loads((folder / "result.json").read_text("utf-8"))
    return result, (chaos_report if "faults" in result else fuzz_report).page(result)


if __name__ == "__main__":
    sys.exit(main())

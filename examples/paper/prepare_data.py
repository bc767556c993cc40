"""Writes runs/data/: train.jsonl, DAPO-Math-17k without the benchmarks' problems, and one file for each benchmark.

    python examples/paper/prepare_data.py --source FOLDER [--output runs/data]

FOLDER holds the sets as JSONL of {"problem", "answer"} (README.md says where they come from): dapo_math_17k_dedup,
aime24, aime25, amc23 and math500, each .jsonl. A training problem is left out where a benchmark has it, too, or where
it occurs with two different answers.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

TRAIN = "dapo_math_17k_dedup"
BENCHMARKS = ("aime24", "aime25", "amc23", "math500")


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    """Returns the records of a set; raises ValueError naming the file and what is wrong with it."""
    file = folder / f"{name}.jsonl"
    if not file.is_file():
        raise ValueError(f"{file} does not exist; examples/paper/README.md says where the sets come from")
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    for number, record in enumerate(records, start=1):
        if not {"problem", "answer"} <= record.keys():
            raise ValueError(f"{file}, line {number}: needs problem and answer, has {sorted(record)}")
    return records


_SPACING = re.compile(r"\\(?:left|right|displaystyle|qquad|quad|[,;:! ])|\\?[\s$]|[.,]$")


def essence(problem: str) -> str:
    """Returns a problem without spaces, dollar signs, TeX's spacing and capitals: equal where only these differ."""
    return re.sub(r"\s", "", _SPACING.sub("", unicodedata.normalize("NFKC", problem))).lower()


def clean(train: Iterable[dict[str, Any]], held_out: set[str]) -> tuple[list[dict[str, Any]], int, int]:
    """Returns the training records kept, and how many were held out and how many have two answers."""
    answers: dict[str, set[str]] = defaultdict(set)
    train = list(train)
    for record in train:
        answers[essence(record["problem"])].add(str(record["answer"]).strip())
    kept, leaked, ambiguous = [], 0, 0
    for record in train:
        key = essence(record["problem"])
        leaked += key in held_out
        ambiguous += key not in held_out and len(answers[key]) > 1
        if key not in held_out and len(answers[key]) == 1:
            kept.append(record)
    return kept, leaked, ambiguous


def write(file: Path, records: Iterable[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder of the JSONL files")
    parser.add_argument("--output", type=Path, default=Path("runs/data"), help="default %(default)s")
    options = parser.parse_args(arguments)
    try:
        benchmarks = {name: read(options.source, name) for name in BENCHMARKS}
        train = read(options.source, TRAIN)
    except ValueError as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 2
    held_out = {essence(record["problem"]) for records in benchmarks.values() for record in records}
    kept, leaked, ambiguous = clean(train, held_out)
    write(options.output / "train.jsonl", kept)
    for name, records in benchmarks.items():
        write(options.output / f"{name}.jsonl", records)
    print(f"train {len(kept):,} of {len(train):,} (left out: {leaked} in a benchmark, {ambiguous} with two answers); "
          + ", ".join(f"{name} {len(records)}" for name, records in benchmarks.items()))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())

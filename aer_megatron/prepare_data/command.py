"""Prepares problems: takes known sets, finds what is wrong with a file, and keeps evaluation problems out of training.

    aer data fetch SET [SET ...] [--from FILE] [--output FOLDER]
    aer data check FILE [FILE ...] [--verifier NAME] [--output CLEAN.jsonl] [--json REPORT.json]
    aer data decontaminate TRAIN --against FILE [--against FILE ...] [--output CLEAN.jsonl] [--hits HITS.jsonl]

Exit codes: 0 done, 2 the input is at fault, 1 anything else.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from aer_megatron.console.command_line import CommandLine, Given, Option, whole
from aer_megatron.console.failures import Edge
from aer_megatron.options.data import RewardSection
from aer_megatron.prepare_data import tables
from aer_megatron.prepare_data.check import check
from aer_megatron.prepare_data.decontaminate import HeldOut
from aer_megatron.prepare_data.fetch import fetch
from aer_megatron.prepare_data.known_sets import KNOWN_SETS
from aer_megatron.prepare_data.problems import (
    ProblemFile,
    check_outputs,
    read_problems,
    write_lines,
    write_problems,
    write_text,
)
from aer_megatron.rewards.pool import VerifierPool, check_verifiers

_VERIFIER = "math"
_NUM_WORKERS = 2
_N = 13
_SHARE = 0.3
_FORMAT = 1
_FORMS_TEXT = f"""
aer data fetch SET [SET ...] [--from FILE] [--output FOLDER]
  Writes FOLDER/SET.jsonl from the Hugging Face hub, or from a file of the set that is here (JSONL or Parquet, with the
  hub's columns). SET is {", ".join(KNOWN_SETS)}.
aer data check FILE [FILE ...] [--verifier NAME] [--output CLEAN.jsonl] [--json REPORT.json]
  Problems that come twice, problems with several answers, and gold answers that their verifier does not judge correct.
aer data decontaminate TRAIN --against FILE [--against FILE ...] [--output CLEAN.jsonl] [--hits HITS.jsonl]
  Training problems that an evaluation set has, too: the same text, the same but for spacing, or a share of its
  sequences of words."""


def _fetch(given: Given) -> dict[str, Any]:
    unknown = next((name for name in given.places[1:] if name not in KNOWN_SETS), None)
    if unknown is not None:
        raise ValueError(f"{unknown} is no known set; use {', '.join(KNOWN_SETS)}")
    if given["from"] is not None and len(given.places) != 2:
        raise ValueError("--from is one file, so it takes one set")
    folder = given["output"] or Path("data")
    fetched = {}
    for name in given.places[1:]:
        path = folder / f"{name}.jsonl"
        check_outputs([path], [given["from"]] if given["from"] else [])
        fetched[name] = (fetch(KNOWN_SETS[name], path, given=given["from"], verifier=_VERIFIER), KNOWN_SETS[name].size)
    Console().print(tables.fetched_table(fetched))
    return {
        "sets": {
            name: {"file": str(found.path), "problems": found.num_problems, "known_size": size}
            | {"repeated_rows": found.num_repeated, "bad_rows": tables.bad_values(found.bad)}
            for name, (found, size) in fetched.items()
        }
    }


def _check(given: Given) -> dict[str, Any]:
    files = _read(given.places[1:], given["verifier"] or _VERIFIER)
    if given["output"] is not None and len(files) > 1:
        raise ValueError("--output is one file, so it takes one FILE")
    check_outputs([given["output"], given["json"]], [file.path for file in files])
    check_verifiers({problem.record.verifier for file in files for problem in file.problems})
    timeout_s = given["timeout"] or RewardSection().timeout_s
    with VerifierPool(given["workers"] or _NUM_WORKERS, timeout_s) as pool:
        found = {file.path: check(file, pool) for file in files}
    console = Console()
    for path, findings in found.items():
        for table in tables.fault_tables(findings):
            console.print(tables.plain(path, 200), table, sep="\n")
    console.print(tables.checked_table(found))
    if given["output"] is not None:
        write_problems(given["output"], found[files[0].path].kept, given["verifier"] or _VERIFIER)
    return {"files": {str(path): tables.findings_value(findings) for path, findings in found.items()}}


def _decontaminate(given: Given) -> dict[str, Any]:
    if not given["against"]:
        raise ValueError("--against is missing: a file of evaluation problems; give --against FILE")
    if len(given.places) != 2:
        raise ValueError(f"aer data decontaminate takes one TRAIN, and {len(given.places) - 1} were given")
    (train,) = _read(given.places[1:], _VERIFIER)
    held_out = _read(given["against"], _VERIFIER)
    outputs = [given["output"], given["hits"], given["json"]]
    check_outputs(outputs, [file.path for file in (train, *held_out)])
    n, share = given["ngram"] or _N, given["share"] or _SHARE
    lookup = HeldOut(held_out, n=n, share=share)
    found = [(problem, lookup.find(problem)) for problem in train.problems]
    hits = [hit for _, hit in found if hit is not None]
    kept = [problem for problem, hit in found if hit is None]
    console = Console()
    for table in tables.hit_tables(hits):
        console.print(table)
    bad = {str(file.path): tables.bad_values(file.bad) for file in (train, *held_out) if file.bad}
    for name, rows in bad.items():
        console.print(tables.plain(f"{name}: {len(rows)} bad rows are left out; aer data check lists them", 200))
    console.print(f"{len(kept)} of {len(train.problems)} training records are kept, {len(hits)} left out")
    if given["output"] is not None:
        write_problems(given["output"], kept, _VERIFIER)
    if given["hits"] is not None:
        write_lines(given["hits"], map(tables.hit_value, hits))
    return {
        "train": str(train.path),
        "against": [str(file.path) for file in held_out],
        "ngram": n,
        "share": share,
        "records": len(train.problems),
        "kept": len(kept),
        "bad_rows": bad,
        "hits": [tables.hit_value(hit) for hit in hits],
    }


# form -> (what it does, its options)
_FORMS: dict[str, tuple[Callable[[Given], dict[str, Any]], set[str]]] = {
    "fetch": (_fetch, {"from", "output", "json"}),
    "check": (_check, {"verifier", "workers", "timeout", "output", "json"}),
    "decontaminate": (_decontaminate, {"against", "ngram", "share", "output", "hits", "json"}),
}


def _run(given: Given, edge: Edge) -> int:
    form = given.place
    if form not in _FORMS:
        raise ValueError(f"{form} is no form of aer data; use {', '.join(_FORMS)}")
    work, takes = _FORMS[form]
    for name, value in given.options.items():
        if value and name not in takes:
            raise ValueError(f"--{name} is no option of aer data {form}; it has --{', --'.join(sorted(takes))}")
    report = {"format": _FORMAT, "form": form} | work(given)
    if given["json"] is not None:
        write_text(given["json"], json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return 0


def _read(places: Any, verifier: str) -> list[ProblemFile]:
    return [read_problems(Path(place), verifier) for place in dict.fromkeys(map(str, places))]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("must be a number") from None


def _share(text: str) -> float:
    if not 0.0 < (share := _number(text)) <= 1.0:
        raise ValueError("must be above 0 and at most 1")
    return share


def _seconds(text: str) -> float:
    if not 0.0 < (seconds := _number(text)) < 1e6:
        raise ValueError("must be a number of seconds above 0")
    return seconds


COMMAND = CommandLine(
    "data",
    about="Prepares problems: takes known sets, finds what is wrong with a file, and keeps evaluation problems out of "
    "training. Files are JSONL or Parquet, also of verl and slime; what is written is JSONL, whole or not at all.",
    run=_run,
    place="FORM FILE",
    what=f"{', '.join(_FORMS)}",
    overrides=False,
    several_places=True,
    options=(
        Option("output", "PATH", "fetch: the folder [data]; else the file of the records without fault", Path),
        Option("from", "FILE", "fetch: take the set from this file", Path),
        Option("verifier", "NAME", f"check: of records that name none [{_VERIFIER}]"),
        Option("workers", "N", f"check: verifier processes [{_NUM_WORKERS}]", whole(1)),
        Option("timeout", "SECONDS", f"check: limit of one answer [{RewardSection().timeout_s:g}]", _seconds),
        Option("against", "FILE", "decontaminate: evaluation problems; may be given several times", repeated=True),
        Option("ngram", "N", f"decontaminate: words of a sequence [{_N}]", whole(1)),
        Option("share", "X", f"decontaminate: of an evaluation problem's sequences, to be a hit [{_SHARE}]", _share),
        Option("hits", "FILE", "decontaminate: writes the hits with both texts, as JSONL", Path),
        Option("json", "FILE", "writes all that was found, as JSON", Path),
    ),
    more_help=lambda: _FORMS_TEXT,
)
main = COMMAND.main

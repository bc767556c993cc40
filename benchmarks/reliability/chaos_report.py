"""Whether a killed run ended like the one that was never killed, and what each fault cost."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aer_megatron._C import DifficultyLedger
from aer_megatron.report.metrics import MACHINE_PREFIXES
from benchmarks.reliability.chaos_plan import lost_seconds
from benchmarks.reliability.records import machine, source_commit_name
from benchmarks.reliability.tiny_run import GROUP_SIZE, PROMPTS

STATE_WITH_SERVERS = ("next_step", "policy_version", "cursor", "pending")


def compare(folder: Path, *, engine: str, num_steps: int) -> list[str]:
    """Returns what differs between ``straight`` and ``killed``, one line each; nothing where all is as asked."""
    straight, killed = (folder / name / "run" for name in ("straight", "killed"))
    found: list[str] = []
    for name, output in (("straight", straight), ("killed", killed)):
        found += [f"{name}: {line}" for line in check_counts(output, num_steps)]
    if engine == "embedded":
        found += differences("metrics.jsonl", *(_lines(output / "metrics.jsonl") for output in (straight, killed)))
        found += differences("flight.jsonl", *(_lines(output / "flight.jsonl") for output in (straight, killed)))
        found += differences("checkpoint file", *(_digests(output) for output in (straight, killed)))
        found += differences("state", *(_manifest(output)["state"] for output in (straight, killed)))
    else:
        states = [
            {name: _manifest(output)["state"].get(name) for name in STATE_WITH_SERVERS} for output in (straight, killed)
        ]
        found += differences("state", *states)
        found += differences("attempts of prompt", *(_attempts(output) for output in (straight, killed)))
    return found


def check_counts(output: Path, num_steps: int) -> list[str]:
    """Returns what is wrong with the number of steps, of verdicts, and of times that a prompt was trained."""
    found = []
    lines = list(_lines(output / "metrics.jsonl").values())
    steps = [line["step"] for line in lines]
    if steps != list(range(num_steps)):
        found.append(f"metrics.jsonl holds {len(steps)} steps, not 0 to {num_steps - 1} in order")
    wanted = PROMPTS * GROUP_SIZE
    for line in lines:
        judged = sum(count for name, count in line.items() if name.startswith("rewards/reason/"))
        if judged != wanted:
            found.append(f"step {line['step']}: {judged} verdicts, not {wanted}")
    attempts = np.array(list(_attempts(output).values()))
    if sorted(set(attempts.tolist())) != [GROUP_SIZE] or len(attempts) != num_steps * PROMPTS:
        found.append(
            f"the ledger counts {len(attempts)} prompts with {sorted(set(attempts.tolist()))} attempts each, not "
            f"{num_steps * PROMPTS} with {GROUP_SIZE}"
        )
    return found


def differences(what: str, first: Mapping[Any, Any], second: Mapping[Any, Any]) -> list[str]:
    """Returns one line for the keys that differ, naming the first of them."""
    keys = [key for key in {**first, **second} if first.get(key) != second.get(key)]
    if not keys:
        return []
    one, other = first.get(keys[0]), second.get(keys[0])
    if isinstance(one, dict) and isinstance(other, dict):
        inner = {**one, **other}
        one, other = ({k: side.get(k) for k in inner if one.get(k) != other.get(k)} for side in (one, other))
    return [f"{what} {keys[0]} (and {len(keys) - 1} more): {str(one)[:200]} was {str(other)[:200]} with kills"]


def write_report(
    folder: Path, states: Mapping[str, Mapping[str, Any]], found: Sequence[str], given: Mapping[str, Any]
) -> int:
    """Returns 0 where nothing differs, 1 elsewhere; writes result.json and chaos.md."""
    straight, killed = states["straight"], states["killed"]
    faults = killed["faults"]
    step_s = straight["wall_s"] / max(1, given["steps"])
    lost = lost_seconds(faults, step_s=step_s)
    crashed = sum(
        line.get("rewards/reason/crashed", 0) for line in _lines(folder / "killed" / "run" / "metrics.jsonl").values()
    )
    result = {
        "given": {name: str(value) if isinstance(value, Path) else value for name, value in given.items()},
        "commit": source_commit_name(),
        "machine": machine(),
        "load": float(np.median([fault["load"] for fault in faults] or [0.0])),
        "equal": not found,
        "differences": list(found),
        "straight_s": straight["wall_s"],
        "killed_s": killed["wall_s"],
        "lost_s_per_fault": (killed["wall_s"] - straight["wall_s"]) / max(1, len(faults)),
        "launches": killed["launches"],
        "ended_unkilled": sum(1 for launch in killed["launches"] if launch["code"] and not launch["killed"]),
        "left": [name for launch in killed["launches"] for name in launch["left"]],
        "verdicts_crashed": crashed,
        "faults": [fault | {"lost_s": seconds} for fault, seconds in zip(faults, lost, strict=True)],
    }
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = page(result)
    (folder / "chaos.md").write_text(text, encoding="utf-8")
    print(text)
    return int(bool(found))


def page(result: Mapping[str, Any]) -> str:
    """Returns the Markdown text of one result."""
    given, faults = result["given"], result["faults"]
    words = f"--kills {given['kills']} --engine {given['engine']} --seed {given['seed']}"
    servers = f"{given['servers']} servers, staleness {given['staleness']}"
    if given["engine"] == "sglang":
        words += f" --servers {given['servers']} --staleness {given['staleness']}"
        words += " --keep-servers" if given["keep_servers"] else ""
    name = "embedded engine" if given["engine"] == "embedded" else servers
    inside = sum(fault["moment"] == "checkpoint" and fault["inside_write"] for fault in faults)
    lines = [
        f"## Chaos, {name}: {'equal' if result['equal'] else 'NOT EQUAL'}",
        "",
        f"`python -m benchmarks.reliability.chaos --out FOLDER {words}`",
        "",
        f"- commit {result['commit']}, {result['machine']}, load {result['load']:.1f} (median over the kills)",
        f"- {given['steps']} steps, {len(faults)} kills, {inside} of them while a checkpoint was being written;",
        f"  {len(result['launches'])} launches, {result['ended_unkilled']} of which failed without a kill",
        f"- {result['straight_s']:.0f} s without kills, {result['killed_s']:.0f} s with them:"
        f" {result['lost_s_per_fault']:.1f} s lost per kill",
        f"- verdicts `crashed`: {result['verdicts_crashed']}; processes that outlived their launcher by 40 s:"
        f" {', '.join(result['left']) or 'none'}",
        *(f"- differs: {line}" for line in result["differences"]),
        "",
        "| killed | moment | kills | seconds lost: mean | largest |",
        "|---|---|---|---|---|",
    ]
    for victim, moment in sorted({(fault["victim"], fault["moment"]) for fault in faults}):
        lost = [fault["lost_s"] for fault in faults if (fault["victim"], fault["moment"]) == (victim, moment)]
        lines.append(f"| {victim} | {moment} | {len(lost)} | {np.mean(lost):.1f} | {max(lost):.1f} |")
    return "\n".join([*lines, ""])


def _lines(path: Path) -> dict[int, dict[str, Any]]:
    """Returns a JSONL file's records by line number, without what depends on the machine."""
    texts = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    records = [json.loads(text) for text in texts]
    return {
        number: {name: value for name, value in record.items() if not name.startswith(MACHINE_PREFIXES)}
        for number, record in enumerate(records)
    }


def _checkpoint(output: Path) -> Path:
    return max((output / "checkpoints").glob("step_????????"), key=lambda path: int(path.name[5:]))


def _digests(output: Path) -> dict[str, str]:
    """Returns SHA-256 of every file of the last checkpoint but its manifest, which names versions and times."""
    folder = _checkpoint(output)
    paths = [path for path in folder.iterdir() if path.suffix != ".json"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def _manifest(output: Path) -> dict[str, Any]:
    table: dict[str, Any] = json.loads((_checkpoint(output) / "manifest.json").read_text("utf-8"))
    return table


def _attempts(output: Path) -> dict[int, int]:
    """Returns how often each prompt was tried, by its id; only those that were."""
    exported = DifficultyLedger.load(str(_checkpoint(output) / "ledger")).export()
    pairs = zip(exported.prompt_ids.tolist(), exported.attempts.tolist(), strict=True)
    return {prompt: int(count) for prompt, count in pairs if count}

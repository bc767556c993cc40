"""Shows on the user's own run that nothing is lost where it is stopped and goes on, also under another layout.

    aer verify-resume RUN.toml
    aer verify-resume RUN.toml --nproc 4 --to tp=1,pp=2 --to tp=4 --optimizer.lr=1e-5

The run is shortened (2 k steps, few prompts, short responses) and works in a folder of its own. Exit codes: 0 nothing
is lost, 1 something is, 2 configuration or data are wrong.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aer_megatron.config import Config
from aer_megatron.config_loading import load_config
from aer_megatron.console.command_line import CommandLine, Given, Option, whole
from aer_megatron.report.metrics import Metric
from aer_megatron.report.writer import read_metrics
from aer_megatron.verify_resume.comparison import Row, compare_files, compare_lines, compare_tables, table_text
from aer_megatron.verify_resume.short_run import LAYOUT_OPTIONS, ShortRun, ShortRunRequest, layout_name, shorten

if TYPE_CHECKING:
    from aer_megatron.checkpoint.manifest import Manifest

_MORE_HELP = """
The run is made straight on for 2 K steps; from its checkpoint at step K it is resumed by new processes, under its own
layout and under others; the checkpoint itself goes through the other layouts and back. Prints one row per claim. The
run is shortened, and its entropy target raised, so that every step has a gradient whatever the rewards.
Writes nothing below run.output_dir. Exit codes: 0 nothing is lost, 1 something is, 2 configuration or data are wrong.
"""
BOUNDS = {"fp32": 1e-5, "bf16": 5e-2}  # of a step's metrics under another layout: rounding, see docs/parallelism.md
CUDA_BOUND = 1e-3  # of the same layout, where kernels add in any order
WEIGHTS_BOUND = 0.1  # |difference| / |what the resumed steps changed|; a lost optimizer state is some 0.5


def launch_command(num_ranks: int, *program: str) -> list[str]:
    """Returns the command that starts ``program`` on so many ranks of this machine."""
    return [sys.executable, "-m", "aer_megatron.cli", "launch", "--nproc", str(num_ranks), *program]


def _verify(command: ShortRunRequest) -> int:
    """Makes the runs, prints the table, and returns 0 where every claim holds, else 1."""
    start = time.monotonic()
    short = shorten(command)
    own = layout_name(short.config, short.config.check_world_size(short.num_ranks))
    print(
        f"verify-resume: {short.num_ranks} ranks, {own}, {short.config.model.dtype}; {2 * short.steps} steps of "
        f"{short.config.rollout.prompts_per_step} x {short.config.rollout.group_size} responses of at most "
        f"{short.config.rollout.max_new_tokens} tokens; other layouts: {', '.join(short.layouts) or 'none fits'}",
        flush=True,
    )
    if load_config(command.run_file, command.overrides).rollout.engine != short.config.rollout.engine:
        print("rollout.engine: the embedded engine takes the place of the SGLang servers (--keep-engine keeps them)")
    folder = Path(tempfile.mkdtemp(prefix="aer-verify-resume-", dir=command.work))
    rows = _rows(short, own, folder)
    print("\n" + table_text(rows) + "\n")
    failed = sum(not row.holds for row in rows)
    if failed:
        print(f"the runs and their logs are kept in {folder}")
    else:
        shutil.rmtree(folder)
    word = f"{failed} of {len(rows)} claims failed" if failed else f"nothing is lost, {len(rows)} claims hold"
    print(f"verify-resume: {word}; {time.monotonic() - start:.0f} s", flush=True)
    return 1 if failed else 0


def _rows(short: ShortRun, own: str, folder: Path) -> list[Row]:
    """Makes the runs below ``folder`` and returns what comes out of comparing them."""
    import torch

    exact = 0.0 if not torch.cuda.is_available() else CUDA_BOUND
    bound = max(BOUNDS[short.config.model.dtype], exact)
    k, end = short.steps, 2 * short.steps
    straight = _train(short, folder / "straight", ())
    lines = _metrics(straight)
    resumed = _resume(short, straight, folder / "resumed", ())
    rows = [
        Row(f"resumed, {own}: metrics of steps {k} to {end - 1}", *_with(exact, compare_lines(
            lines[k:], _metrics(resumed)[k:], bound=exact))),
        *_end_rows(straight, resumed, end, f"resumed, {own}", exact),
    ]  # fmt: skip
    if not any(line.get(Metric.TRAIN_GRAD_NORM) for line in lines):
        rows[0] = dataclasses.replace(rows[0], note="no gradient in any step (equal rewards): a weak proof")
    rows += _reshard_rows(short, own, straight, folder)
    for name, changes in short.layouts.items():
        other = _resume(short, straight, folder / name.replace(" ", "-"), changes)
        found = compare_lines(lines[k : k + 1], _metrics(other)[k : k + 1], bound=bound)
        rows.append(Row(f"resumed, {name}: metrics of step {k}", *_with(bound, found)))
        rows += _other_end_rows(short, straight, other, name)
    return rows


def _with(bound: float, found: tuple[float, str]) -> tuple[float, float, str]:
    """Returns (difference, bound, note); what is within the bound needs no note."""
    return found[0], bound, found[1] if not found[0] <= bound else ""


def _end_rows(one: Path, other: Path, step: int, what: str, exact: float) -> list[Row]:
    first, second = _manifest(_checkpoint(one, step)), _manifest(_checkpoint(other, step))
    found = compare_tables(_standing(first), _standing(second))
    rows = [Row(f"{what}: controller, data cursor, updates after step {step - 1}", *_with(exact, found))]
    if not exact:  # where kernels add in any order, bits are no measure
        found = compare_files(_digests(first), _digests(second))
        rows.append(Row(f"{what}: weights, optimizer, ledger after step {step - 1}", *_with(0.0, found)))
    return rows


def _other_end_rows(short: ShortRun, straight: Path, other: Path, name: str) -> list[Row]:
    """Returns rows of a resume under another layout; under bf16 its later samples may differ, by rounding."""
    end = 2 * short.steps
    one, two = (_whole_numbers(_standing(_manifest(_checkpoint(each, end)))) for each in (straight, other))
    whole = compare_tables(one, two)
    rows = [Row(f"resumed, {name}: data cursor, updates after step {end - 1}", *_with(0.0, whole))]
    if short.config.model.dtype == "fp32":
        share = _moved_apart(short.config, straight, other, short.steps)
        note = "" if share <= WEIGHTS_BOUND else "share of what the steps changed"
        rows.append(Row(f"resumed, {name}: weights after step {end - 1}", share, WEIGHTS_BOUND, note))
    return rows


def _reshard_rows(short: ShortRun, own: str, straight: Path, folder: Path) -> list[Row]:
    """Returns one row per layout that the checkpoint at step k was taken through, its own included."""
    layouts = {own: (), **short.layouts}
    source = folder / "middle"
    source.mkdir()
    shutil.copytree(_checkpoint(straight, short.steps), source / _checkpoint(straight, short.steps).name)
    job = folder / "reshard.json"
    job.write_text(
        json.dumps(
            {
                "run_file": short.run_file,
                "overrides": [*short.overrides, f"--run.output_dir={folder / 'reshard'}"],
                "layouts": {name: list(changes) for name, changes in layouts.items()},
                "source": str(source),
                "target": str(folder / "through"),
            }
        ),
        encoding="utf-8",
    )
    program = ("-m", "aer_megatron.verify_resume.resharding", str(job))
    _run(launch_command(short.num_ranks, *program), folder / "reshard.log")
    before = _manifest(_checkpoint(straight, short.steps))
    rows = []
    for name in layouts:
        back = _manifest(folder / "through" / name / "back" / _checkpoint(straight, short.steps).name)
        found = compare_files(_digests(before), _digests(back))
        if not found[0]:
            found = compare_tables(_standing(before), _standing(back))
        way = "read and written again" if name == own else f"through {name} and back"
        rows.append(Row(f"checkpoint of step {short.steps} {way}: weights, optimizer, ledger", *_with(0.0, found)))
    return rows


def _train(short: ShortRun, folder: Path, changes: Sequence[str]) -> Path:
    options = [*short.overrides, *changes, f"--run.output_dir={folder}"]
    _run(launch_command(short.num_ranks, short.run_file, *options), folder.with_name(f"{folder.name}.log"))
    return folder


def _resume(short: ShortRun, straight: Path, folder: Path, changes: Sequence[str]) -> Path:
    """Returns a run folder whose first k steps are those of the straight run, and the others new processes'."""
    checkpoint = _checkpoint(straight, short.steps)
    shutil.copytree(checkpoint, folder / "checkpoints" / checkpoint.name)
    lines = (straight / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[: short.steps]), encoding="utf-8")
    return _train(short, folder, changes)


def _run(command: Sequence[str], log: Path) -> None:
    print(f"  {log.stem} ...", flush=True)
    with log.open("wb") as stream:
        code = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        message = f"{lines[-1] if lines else 'no output'} (exit code {code}; log: {log})"
        raise ValueError(message) if code == 2 else RuntimeError(message)


def _moved_apart(config: Config, straight: Path, other: Path, steps: int) -> float:
    """Returns |weights of one - of the other| / |weights of one - of the checkpoint that both began with|."""
    from aer_megatron.checkpoint.weights import RunCheckpoint
    from aer_megatron.compose.common import architecture

    arch = architecture(config.model.path)
    folders = (_checkpoint(straight, 2 * steps), _checkpoint(other, 2 * steps), _checkpoint(straight, steps))
    apart = moved = 0.0
    for (_, one), (_, two), (_, begin) in zip(*(RunCheckpoint(each).tensors(arch) for each in folders), strict=True):
        apart += float((one.double() - two.double()).square().sum())
        moved += float((one.double() - begin.double()).square().sum())
    return math.sqrt(apart / moved) if moved else (math.inf if apart else 0.0)


def _metrics(folder: Path) -> list[dict[str, Any]]:
    return list(read_metrics(folder / "metrics.jsonl"))


def _checkpoint(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step_{step:08d}"


def _manifest(checkpoint: Path) -> Manifest:
    from aer_megatron.checkpoint.manifest import manifest_from_json, read_manifest_text

    return manifest_from_json(read_manifest_text(checkpoint), checkpoint)


def _standing(manifest: Manifest) -> dict[str, Any]:
    return {"updates": manifest.num_updates, **manifest.state}


def _whole_numbers(table: Any) -> Any:
    """Returns a table without its fractions, which rounding may change."""
    if isinstance(table, dict):
        return {key: _whole_numbers(value) for key, value in table.items() if not isinstance(value, float)}
    return table


def _digests(manifest: Manifest) -> dict[str, str]:
    """File -> digest; random-number states are a layout's own and stay as seeded under another one."""
    return {name: entry.sha256 for name, entry in manifest.files.items() if entry.part != "rng"}


def _layout(text: str) -> Mapping[str, str]:
    pairs = [part.partition("=") for part in text.replace(" ", "").split(",")]
    for name, _, value in pairs:
        switch = name == "sequence_parallel" and value in ("true", "false")
        if name not in LAYOUT_OPTIONS or not (switch or (value.isascii() and value.isdigit() and len(value) < 5)):
            raise ValueError(f"must look like tp=1,pp=2; sizes of {', '.join(LAYOUT_OPTIONS)}")
    return {name: value for name, _, value in pairs}


def _request(given: Given) -> ShortRunRequest:
    options = {name.replace("-", "_"): value for name, value in given.options.items()}
    return ShortRunRequest(given.place, given.overrides, **options)


COMMAND = CommandLine(
    "verify-resume",
    about="Shows on your own run that nothing is lost where it is stopped and goes on, also under another layout.",
    run=lambda given, edge: _verify(_request(given)),
    place="RUN.toml",
    what="the run file, with the same overrides as for training",
    options=(
        Option("nproc", "N", "ranks on this machine [the fewest that the layout takes]", whole(1)),
        Option(
            "to",
            "LAYOUT",
            "resume under this layout, too: --to tp=1,pp=2 (several; the rest as in the run) [two others]",
            _layout,
            repeated=True,
        ),
        Option("steps", "K", "steps before the checkpoint and again after it", whole(1), 2),
        Option("work", "FOLDER", "where the runs are made, a new folder below it is removed afterwards [the system's]"),
        Option("keep-engine", "", 'with rollout.engine = "sglang": use its servers instead of the embedded engine'),
    ),
    more_help=lambda: _MORE_HELP,
)
main = COMMAND.main

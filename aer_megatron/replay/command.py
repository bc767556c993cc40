"""Replays a controller on a recorded run, offline and open loop.

    aer replay RUN --algo.entropy.update=pi --algo.entropy.eta=0.01 --algo.entropy.k_p=2
    aer replay RUN                      the run's own settings: reproduces its coefficients exactly

Exit codes: 0 done, 2 the options or the run are wrong (one clear message).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aer_megatron.algo.entropy_rules.base import EntropyRule
from aer_megatron.algo.flight import FlightRecord, ReplayedStep, replay
from aer_megatron.config import Config
from aer_megatron.config_loading import parse_overrides
from aer_megatron.config_section import TRUST_CODE, refuse_recorded_code
from aer_megatron.console.command_line import CommandLine, Option, run_file_options
from aer_megatron.report.flight import read_flight
from aer_megatron.report.writer import MANIFEST_FILE, read_run_manifest

_OPEN_LOOP = """
The replay is OPEN LOOP: every controller sees the entropies of the recorded run, whatever its own coefficient would
have made of them. It shows how a controller reads a run, not how the run would have gone."""

COLUMNS = (
    "step",
    "token_entropy",
    "recorded_target",
    "replayed_target",
    "recorded_alpha",
    "replayed_alpha",
    "recorded_coefficient",
    "replayed_coefficient",
    "recorded_difficulty_mean",
    "replayed_difficulty_mean",
    "held",
    "frozen",
    "alarm",
    "reason",
)


def replay_run(run: str, overrides: Sequence[str], output: str | None, *, trusted: bool = False) -> str:
    """Returns the summary of a replay after writing its CSV and its picture.

    Args:
        run: run.output_dir of a run with report.flight_recorder=true.
        overrides: ``--algo.entropy.NAME=value``, in place of what the run had.
        output: the picture; the trace is written beside it.
        trusted: classes that run.json names may be imported.

    Raises:
        ValueError: the run has no recording or no run.json, an option is out of its range, or a file cannot be written.
    """
    records = _last_stretch(read_flight(run))
    manifest = read_run_manifest(run)
    if not manifest:
        raise ValueError(f"{run} has no {MANIFEST_FILE}, which names the options; give a whole run folder")
    refuse_recorded_code(manifest["config"], Path(run) / MANIFEST_FILE, trusted=trusted)
    config = Config.from_table(manifest["config"])
    recorded = config.algo.entropy
    options = config.with_options(_changes(overrides)).algo.entropy
    steps = replay(records, options, recorded=recorded)
    records = records[-len(steps) :]
    picture = Path(output) if output else Path(run) / "replay.png"
    if picture.suffix != ".png":
        raise ValueError(f"--output={picture} must end in .png; the trace is written beside it as .csv")
    try:
        write_trace(picture.with_suffix(".csv"), records, steps, recorded)
        _draw(picture, records, steps, title=str(manifest["name"]), recorded=recorded, replayed=options)
    except OSError as error:
        raise ValueError(f"--output={picture} cannot be written: {error.strerror}; choose another folder") from None
    return summary(records, steps, same=options == recorded) + f"\n{picture}"


def _changes(overrides: Sequence[str]) -> dict[str, Any]:
    for override in overrides:
        if not override.startswith("--algo.entropy."):
            raise ValueError(f"{override}: a replay changes algo.entropy alone; write --algo.entropy.NAME=value")
    return parse_overrides(overrides)


def summary(records: Sequence[FlightRecord], steps: Sequence[ReplayedStep], *, same: bool) -> str:
    """Returns one line: the range of steps, both coefficients, where they differ most, and that the loop is open.

    ``same`` says that the replayed options are the run's own; a difference then means that the run changed its options.
    """
    recorded = np.array([record.state.alpha for record in records])
    replayed = np.array([step.decision.state.alpha for step in steps])
    difference = np.abs(replayed - recorded)
    worst = int(difference.argmax())
    held = sum(step.decision.held for step in steps)
    frozen = sum(step.decision.frozen for step in steps)
    text = f"steps {steps[0].step}-{steps[-1].step}: alpha "
    if not difference.any():
        text += f"reproduced exactly, mean {recorded.mean():.4g}, last {recorded[-1]:.4g}"
    else:
        text += (
            f"recorded mean {recorded.mean():.4g}, last {recorded[-1]:.4g}; replayed mean {replayed.mean():.4g}, last "
            f"{replayed[-1]:.4g}; they differ most at step {steps[worst].step}, by {difference[worst]:.4g}"
        )
        if same:
            first = steps[int(np.flatnonzero(difference)[0])].step
            text += f"; the run's own options differ from step {first} on: it was resumed with other options"
    return text + f"; held {held}, frozen {frozen}; open loop: H is the recorded one"


def write_trace(
    path: Path, records: Sequence[FlightRecord], steps: Sequence[ReplayedStep], recorded: EntropyRule
) -> None:
    """Writes both traces as CSV, one row per step with ``COLUMNS``; floats by repr, what is not finite empty."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for record, step in zip(records, steps, strict=True):
            writer.writerow(
                [
                    step.step,
                    *map(
                        _cell,
                        (
                            _mean_entropy(record),
                            recorded.target_entropy(record.state.initial_entropy),
                            step.decision.target,
                            record.state.alpha,
                            step.decision.state.alpha,
                            record.coefficient,
                            step.decision.coefficient,
                            record.observation.difficulty_mean,
                            step.observation.difficulty_mean,
                        ),
                    ),
                    int(step.decision.held),
                    int(step.decision.frozen),
                    step.decision.alarm or "",
                    step.decision.reason,
                ]
            )


def _draw(
    picture: Path,
    records: Sequence[FlightRecord],
    steps: Sequence[ReplayedStep],
    *,
    title: str,
    recorded: EntropyRule,
    replayed: EntropyRule,
) -> None:
    # matplotlib takes half a second to import, which a mistyped option should not cost
    from aer_megatron.replay.picture import ReplayTraces, draw_replay

    draw_replay(
        ReplayTraces(
            step=np.array([step.step for step in steps], dtype=np.float64),
            token_entropy=np.array([_mean_entropy(record) for record in records]),
            recorded_target=np.array([recorded.target_entropy(record.state.initial_entropy) for record in records]),
            replayed_target=np.array([step.decision.target for step in steps]),
            recorded_alpha=np.array([record.state.alpha for record in records]),
            replayed_alpha=np.array([step.decision.state.alpha for step in steps]),
        ),
        picture,
        title=title,
        recorded=_describe(recorded),
        replayed=_describe(replayed),
    )


def _print(text: str) -> int:
    print(text)
    return 0


def _last_stretch(records: Sequence[FlightRecord]) -> Sequence[FlightRecord]:
    """Returns the records after the last gap: a recorder that was switched off for a while leaves one."""
    start = 0
    for index in range(1, len(records)):
        if records[index].step != records[index - 1].step + 1:
            start = index
    return records[start:]


def _describe(rule: EntropyRule) -> str:
    """Returns the rule with the options that are not its defaults: ``aer, rho 0.3, tau 0.5, update pi, k_p 2``."""
    options = rule.model_dump(exclude_defaults=True, exclude={"kind"})
    return ", ".join([rule.kind, *(f"{name} {value}" for name, value in options.items())])


def _mean_entropy(record: FlightRecord) -> float:
    observation = record.observation
    return observation.entropy_sum / observation.token_count if observation.token_count else math.nan


def _cell(value: float) -> str:
    return repr(value) if math.isfinite(value) else ""


COMMAND = CommandLine(
    "replay",
    about="Replays an entropy controller on a recorded run, in seconds; without overrides the run's own, which "
    "reproduces its coefficients exactly.",
    run=lambda given, edge: _print(
        replay_run(given.place, given.overrides, given["output"], trusted=given[TRUST_CODE])
    ),
    place="RUN",
    what="the run folder, made with report.flight_recorder=true; any --algo.entropy.NAME=value is replayed instead",
    options=(
        Option("output", "FILE.png", "the picture; the trace is written beside it as FILE.csv [RUN/replay.png]"),
        Option(TRUST_CODE, "", "import the classes of your own that run.json names"),
    ),
    more_help=lambda: f"{_OPEN_LOOP}\n{run_file_options('algo.entropy.')}",
)
main = COMMAND.main

"""Replays a controller on a recorded run, offline and open loop.

    python -m aer_megatron.replay RUN --controller aer --update pi --eta 0.01 --k_p 2 --tau 0.5
    python -m aer_megatron.replay RUN                      the run's own settings: reproduces its coefficients exactly

Exit codes: 0 done, 2 the options or the run are wrong (one clear message).
"""

from __future__ import annotations

import csv
import difflib
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aer_megatron.algo import controller
from aer_megatron.algo.flight import FlightRecord, ReplayedStep, replay
from aer_megatron.algo.options import EntropySection
from aer_megatron.config import Config
from aer_megatron.config_loading import parse_value
from aer_megatron.console.failures import run_command
from aer_megatron.report.flight import read_flight
from aer_megatron.report.writer import MANIFEST_FILE, read_run_manifest

USAGE = """\
usage: python -m aer_megatron.replay RUN [--controller aer|fixed|skywork|none] [--NAME VALUE ...] [--output FILE.png]

  RUN                  run.output_dir of a run made with report.flight_recorder=true
  --controller         algo.entropy.kind of the replayed controller
  --NAME VALUE         any other option of algo.entropy, listed below; the rest stays as it was in the run
  --output FILE.png    the picture; the trace is written beside it as FILE.csv [RUN/replay.png]
  --help               this text

The replay is OPEN LOOP: every controller sees the entropies of the recorded run, whatever its own coefficient would
have made of them. It shows how a controller reads a run, not how the run would have gone.
"""

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


@dataclass(frozen=True, slots=True)
class CommandLine:
    """What the user asked for. Example: ``CommandLine("runs/a", {"kind": "aer", "tau": 0.5}, None)``."""

    run: str
    options: Mapping[str, Any]
    output: str | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code of one replay."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or "--help" in arguments or "-h" in arguments:
        print(help_text())
        return 0
    given = list(arguments)
    return run_command(lambda edge: _print_replay(given))


def _print_replay(arguments: Sequence[str]) -> int:
    print(replay_run(parse_command_line(arguments)))
    return 0


def help_text() -> str:
    """Returns the usage with every option of the controllers."""
    lines = [USAGE, "options of algo.entropy (defaults of the configuration in brackets):"]
    for name, info in EntropySection.model_fields.items():
        if name != "kind":
            lines.append(f"  --{name} [{info.default}]" + (f"  {info.description}" if info.description else ""))
    return "\n".join(lines)


def parse_command_line(arguments: Sequence[str]) -> CommandLine:
    """Returns the parsed arguments; ``--name value`` and ``--name=value`` are the same.

    Raises:
        ValueError: an option is unknown (the nearest one is named), has no value, or RUN is missing or given twice.
    """
    runs, options, output = [], {}, None
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("--"):
            runs.append(argument)
            continue
        flag, separator, text = argument.partition("=")
        name = _option_name(flag)
        value = text if separator else next(rest, None)
        if value is None:
            raise ValueError(f"option {flag} needs a value; give {flag} VALUE")
        if name == "output":
            output = value
        else:
            options[name] = parse_value(value, f"algo.entropy.{name}")
    if len(runs) != 1:
        raise ValueError(f"exactly one RUN is replayed, got {' '.join(runs) or 'none'}; give one run folder")
    return CommandLine(runs[0], options, output)


def replay_run(command: CommandLine) -> str:
    """Returns the summary of a replay after writing its CSV and its picture.

    Raises:
        ValueError: the run has no recording or no run.json, an option is out of its range, or a file cannot be written.
    """
    records = _last_stretch(read_flight(command.run))
    manifest = read_run_manifest(command.run)
    if not manifest:
        raise ValueError(f"{command.run} has no {MANIFEST_FILE}, which names the options; give a whole run folder")
    config = Config.from_table(manifest["config"])
    recorded = config.algo.entropy
    changes = {f"algo.entropy.{name}": value for name, value in command.options.items()}
    options = config.with_options(changes).algo.entropy
    steps = replay(records, options, recorded=recorded)
    records = records[-len(steps) :]
    picture = Path(command.output) if command.output else Path(command.run) / "replay.png"
    if picture.suffix != ".png":
        raise ValueError(f"--output={picture} must end in .png; the trace is written beside it as .csv")
    try:
        write_trace(picture.with_suffix(".csv"), records, steps, recorded)
        _draw(picture, records, steps, title=str(manifest["name"]), recorded=recorded, replayed=options)
    except OSError as error:
        raise ValueError(f"--output={picture} cannot be written: {error.strerror}; choose another folder") from None
    return summary(records, steps, same=options == recorded) + f"\n{picture}"


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
    path: Path, records: Sequence[FlightRecord], steps: Sequence[ReplayedStep], recorded: EntropySection
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
                            controller.target_entropy(record.state, recorded),
                            step.target,
                            record.state.alpha,
                            step.decision.state.alpha,
                            record.coefficient,
                            step.coefficient,
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
    recorded: EntropySection,
    replayed: EntropySection,
) -> None:
    # matplotlib takes half a second to import, which a mistyped option should not cost
    from aer_megatron.replay.picture import ReplayTraces, draw_replay

    draw_replay(
        ReplayTraces(
            step=np.array([step.step for step in steps], dtype=np.float64),
            token_entropy=np.array([_mean_entropy(record) for record in records]),
            recorded_target=np.array([controller.target_entropy(record.state, recorded) for record in records]),
            replayed_target=np.array([step.target for step in steps]),
            recorded_alpha=np.array([record.state.alpha for record in records]),
            replayed_alpha=np.array([step.decision.state.alpha for step in steps]),
        ),
        picture,
        title=title,
        recorded=_describe(recorded),
        replayed=_describe(replayed),
    )


def _last_stretch(records: Sequence[FlightRecord]) -> Sequence[FlightRecord]:
    """Returns the records after the last gap: a recorder that was switched off for a while leaves one."""
    start = 0
    for index in range(1, len(records)):
        if records[index].step != records[index - 1].step + 1:
            start = index
    return records[start:]


def _option_name(flag: str) -> str:
    """Returns the field of a flag: ``--controller`` is ``kind``."""
    name = flag.removeprefix("--").replace("-", "_")
    known = {"controller": "kind", "output": "output"} | {field: field for field in EntropySection.model_fields}
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    raise ValueError(f"unknown option {flag}: did you mean --{near[0]}?")


def _describe(options: EntropySection) -> str:
    """Returns the options that tell a controller from others: ``aer pi, tau 0.5, eta 0.01, k_p 2``."""
    match options.kind:
        case "aer":
            text = f"aer {options.update}, tau {options.tau:g}, eta {options.eta:g}"
            text += f", k_p {options.k_p:g}" if options.update == "pi" else ""
            text += f", alpha_max {options.alpha_max:g}, {options.difficulty}"
            text += f", rho {options.rho:g}" if options.difficulty != "complement" else ""
            text += f", source {options.source}"
        case "fixed":
            text = f"fixed, coefficient {options.coefficient:g}"
        case "skywork":
            text = f"skywork, target {options.skywork_target:g} nats, delta {options.skywork_delta:g}"
        case kind:
            text = str(kind)
    return text + (", shadow" if options.shadow else "")


def _mean_entropy(record: FlightRecord) -> float:
    observation = record.observation
    return observation.entropy_sum / observation.token_count if observation.token_count else math.nan


def _cell(value: float) -> str:
    return repr(value) if math.isfinite(value) else ""


if __name__ == "__main__":
    sys.exit(main())

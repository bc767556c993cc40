"""Examines a run before it starts, on its real launch: the same numbers from every layout, engine and reference?

    aer launch --nproc 2 -m aer_megatron.doctor RUN.toml --parallel.tp=2
    python -m aer_megatron.doctor RUN.toml --reference=never

Exit codes: 0 fit, 1 a check failed (its cause is named), 2 configuration or data are wrong. See docs/doctor.md.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from aer_megatron.config import Config
from aer_megatron.config_loading import load_config, refuse_misspelt
from aer_megatron.console.failures import LOG_FOLDER, Edge, run_command
from aer_megatron.train import quiet_libraries

REFERENCE_MODES = ("auto", "never", "always")

USAGE = """\
usage: aer launch --nproc N -m aer_megatron.doctor RUN.toml [--reference=auto] [--section.key=value ...]
       python -m aer_megatron.doctor RUN.toml ...

  RUN.toml             the run file, with the same overrides as for training
  --reference=auto     ask transformers where an fp32 copy of the model fits into memory; or never, or always
  --help               this text

Prints a table of checks and, for every failure, the likely cause and its remedy. Writes only below
run.output_dir/doctor. Exit codes: 0 fit, 1 a check failed, 2 configuration or data are wrong.
"""


@dataclass(frozen=True, slots=True)
class CommandLine:
    """What the user asked for. Example: ``CommandLine("run.toml", "auto", ("--run.seed=1",))``."""

    run_file: str
    reference: str
    overrides: tuple[str, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code of one rank."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or "--help" in arguments or "-h" in arguments:
        print(USAGE)
        return 0
    quiet_libraries()
    given = list(arguments)
    return run_command(lambda edge: run(given, edge))


def run(arguments: Sequence[str], edge: Edge) -> int:
    """Returns the exit code of what the command line asks for."""
    command = parse_command_line(arguments)
    config = load_config(command.run_file, command.overrides)
    edge.log_folder = Path(config.run.output_dir) / "doctor" / LOG_FOLDER
    return run_doctor(config, command.reference, edge)


def parse_command_line(arguments: Sequence[str]) -> CommandLine:
    """Returns the parsed arguments; raises ValueError for one that is not understood."""
    refuse_misspelt(arguments, ("--reference",))
    run_file, reference, overrides = "", "auto", []
    for argument in arguments:
        if argument.startswith("--reference="):
            reference = argument.partition("=")[2]
            if reference not in REFERENCE_MODES:
                raise ValueError(f"--reference={reference} is not known; use auto, never or always")
        elif argument.startswith("--"):
            overrides.append(argument)
        elif run_file:
            raise ValueError(f"argument {argument!r} is not understood: the run file is already {run_file}")
        else:
            run_file = argument
    if not run_file:
        raise ValueError("the run file is missing; see --help")
    return CommandLine(run_file, reference, tuple(overrides))


def run_doctor(config: Config, reference: str, edge: Edge) -> int:
    """Returns 0 where every check of the examination holds, else 1; rank 0 prints the table."""
    from transformers.utils.logging import disable_progress_bar

    from aer_megatron.compose.common import collective_timeout_s, open_watchdog
    from aer_megatron.doctor.examination import Examiner, ReferenceMode
    from aer_megatron.doctor.table import findings_text, table_text, verdict_text
    from aer_megatron.parallel import platform as platforms
    from aer_megatron.parallel.topology import destroy_topology

    disable_progress_bar()  # the reference model is loaded twice
    start = time.monotonic()
    platform = platforms.install_platform()
    config.check_world_size(platform.world_size)
    platforms.initialize_process_group(platform, timeout_s=collective_timeout_s(config))
    try:
        with edge.noting(), open_watchdog(config, platform) as watchdog:
            examiner = Examiner(
                config,
                platform,
                reference=cast(ReferenceMode, reference),
                on_phase=lambda phase: watchdog.enter_phase(phase, None),
            )
            outcome = examiner.examine()
    finally:
        destroy_topology()
    if platform.rank == 0:
        print(f"doctor: {platform.world_size} ranks, {config.model.dtype}, {outcome.weights}\n")
        print(table_text(outcome.checks))
        print()
        if outcome.causes:
            print(findings_text(outcome.causes) + "\n")
        print(verdict_text(outcome.checks, time.monotonic() - start), flush=True)
    return 0 if outcome.fit else 1


if __name__ == "__main__":
    sys.exit(main())

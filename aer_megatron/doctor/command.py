"""Examines a run before it starts, on its real launch: the same numbers from every layout, engine and reference?

    aer launch --nproc 2 doctor RUN.toml --parallel.tp=2
    aer doctor RUN.toml --reference=never

Exit codes: 0 fit, 1 a check failed (its cause is named), 2 configuration or data are wrong. See docs/doctor.md.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import cast

from aer_megatron.config import Config
from aer_megatron.console.command_line import CommandLine, Given, Option
from aer_megatron.console.failures import LOG_FOLDER, Edge


def _run(given: Given, edge: Edge) -> int:
    config = given.config()
    edge.log_folder = Path(config.run.output_dir) / "doctor" / LOG_FOLDER
    return run_doctor(config, given["reference"], edge)


def run_doctor(config: Config, reference: str, edge: Edge) -> int:
    """Examines the run, prints the table on rank 0, and returns 0 where every check holds, else 1."""
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


COMMAND = CommandLine(
    "doctor",
    about="Prints a table of checks of a run before it starts and, for every failure, the likely cause and its remedy: "
    "every layout, transformers and the rollout engine must give the same numbers. Writes only below "
    "run.output_dir/doctor. Exit codes: 0 fit, 1 a check failed, 2 configuration or data are wrong.",
    run=_run,
    place="RUN.toml",
    what="the run file, with the same overrides as for training",
    under_launch=True,
    options=(
        Option(
            "reference",
            "MODE",
            "ask transformers, by itself where an fp32 copy of the model fits into memory",
            choices=("auto", "never", "always"),
            default="auto",
        ),
    ),
)
main = COMMAND.main

"""The command line of training; compose/ builds what a stage is made of.

    aer launch --nproc 2 RUN.toml --parallel.tp=2 --algo.entropy.kind=aer
    aer train RUN.toml --dry-run
    aer launch --nproc 2 RUN.toml --stage=sft

Exit codes: 0 done (or stopped by SIGUSR1 or run.max_hours), 2 configuration or data are wrong (one clear message),
143 and 130 stopped by SIGTERM or SIGINT and saved, anything else a failure while running.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from aer_megatron.config import Config
from aer_megatron.console.command_line import CommandLine, Given, Option, run_file_options
from aer_megatron.console.failures import LOG_FOLDER, Edge
from aer_megatron.console.standard_streams import say
from aer_megatron.parallel.stop import StopRequests, StopRun


def _run(given: Given, edge: Edge) -> int:
    speaks = os.environ.get("RANK", "0") == "0"  # the ranks' own part needs seconds to be imported
    config = given.config(speaks=speaks)
    edge.log_folder = Path(config.run.output_dir) / LOG_FOLDER
    if given["dry-run"]:
        return _dry_run(config, given["stage"])
    line = functools.partial(say, error=True) if speaks else None
    try:
        with StopRequests(line, max_hours=config.run.max_hours, end=_end_at_once) as stops:
            if speaks:
                say(f"loading libraries, data and {config.model.path} for {config.run.output_dir}")
            run_stage(given["stage"], config, given.arguments, edge, stops)
    except StopRun as stop:
        return stop.cause.exit_code
    return stops.agreed.exit_code


def _dry_run(config: Config, stage: str) -> int:
    """Prints configuration and plan, and returns 0; raises ValueError with everything that is wrong."""
    from aer_megatron.compose.dry_run import dry_run
    from aer_megatron.parallel.platform import read_ranks

    rank, world_size, _ = read_ranks()
    if rank:
        return 0  # one look is enough
    text, found = dry_run(config, stage, world_size)
    say(text)
    for note in found.notes:
        say(note)
    if len(found.problems) > 1:
        raise ValueError("\n".join([f"{len(found.problems)} problems:", *(f"  - {text}" for text in found.problems)]))
    if found.problems:
        raise ValueError(found.problems[0])
    say("no problem found")
    return 0


def _end_at_once(code: int) -> None:
    """Ends the process where it is; a terminal gets back the cursor that the live display hides."""
    if os.isatty(1):
        os.write(1, b"\x1b[?25h\n")
    os._exit(code)


def run_stage(stage: str, config: Config, arguments: Sequence[str], edge: Edge, stops: StopRequests) -> None:
    """Runs the stage to its end, or until it is stopped; every rank calls it."""
    from aer_megatron.compose.common import Process, build_topology, check_model, collective_timeout_s, open_watchdog
    from aer_megatron.compose.out_of_memory import MemoryGuard
    from aer_megatron.parallel import platform as platforms
    from aer_megatron.parallel.exchange import all_max
    from aer_megatron.parallel.topology import destroy_topology
    from aer_megatron.parallel.watchdog import distributed_store
    from aer_megatron.report.profiler import StepProfiler

    platform = platforms.install_platform()
    config.check_world_size(platform.world_size)
    platforms.initialize_process_group(platform, timeout_s=collective_timeout_s(config))
    try:
        agree = functools.partial(all_max, device=platform.device)
        profiled = config.run.profile_steps if stage == "rl" else ()
        with (
            edge.noting(),
            stops.shared(distributed_store(), agree),
            open_watchdog(config, platform) as watchdog,
            MemoryGuard(config, platform) as guard,
            StepProfiler(config.run.output_dir, profiled, rank=platform.rank) as profiler,
        ):
            process = Process(platform, watchdog, stops, (guard.enter_phase, profiler.enter_phase))
            if stage == "sft":
                from aer_megatron.compose.sft import init_path, is_made, run_sft

                # the supervised stage replaces model.path, so the model is read from sft.init
                check_model(config, init_path(config))
                if not is_made(config):
                    topology = build_topology(config)
                    run_sft(config, process, topology, arguments)
                elif platform.rank == 0:
                    print(f"{config.model.path}: made earlier by the same configuration; nothing to do")
            else:
                from aer_megatron.compose.rl import run_rl

                check_model(config, config.model.path)
                topology = build_topology(config)
                run_rl(config, process, topology, arguments)
    finally:
        destroy_topology()


COMMAND = CommandLine(
    "train",
    about="Trains in this process alone; on several ranks: aer launch --nproc N RUN.toml ..., or torchrun's "
    "-m aer_megatron.train RUN.toml ...",
    run=_run,
    place="RUN.toml",
    what="the run file",
    needs_place=False,
    options=(
        Option(
            "stage",
            "STAGE",
            "reinforcement learning, or the supervised stage: it trains the model of sft.init and writes model.path",
            choices=("rl", "sft"),
            default="rl",
        ),
        Option(
            "dry-run",
            "",
            "print the resolved configuration and the plan of one step; check model, tokenizer, data, verifiers, "
            "folders and server options, all at once and without weights; then stop",
        ),
    ),
    more_help=run_file_options,
)
main = COMMAND.main


if __name__ == "__main__":
    sys.exit(main())

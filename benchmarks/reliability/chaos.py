"""SIGKILLs at random moments of a run, which must end as if there had been none.

    python -m benchmarks.reliability.chaos --out runs/reliability/embedded --kills 60 --engine embedded
    python -m benchmarks.reliability.chaos --out runs/reliability/sync --kills 40 --engine sglang
    python -m benchmarks.reliability.chaos --out runs/reliability/async --kills 40 --engine sglang --staleness 2

Two training ranks under a launcher. The kills (ranks, launcher, verifier processes, servers; also inside a checkpoint
write, a weight transfer and a start) are drawn from --seed. After a rank or the launcher was killed the same command is
started again. At the end the run is compared with one that was never killed: with the embedded engine checkpoint files,
metrics and flight record must be equal byte for byte (times aside); with servers, whose sampling is not repeatable,
cursor and step count must be, and every prompt must have been trained exactly once. Seconds lost are counted per fault.

The servers are SGLang's on the CPU (tools/install_sglang_cpu.sh), or with --servers double stand-ins of the protocol
without a model. The run launches and restarts them itself; with --keep-servers the harness does and the run is given
their addresses, so that they outlive its launches (if all of them are down at once, such a run ends after
sglang.recovery_timeout_s: nobody gives them weights in the middle of a step). Interrupted, the same command goes on.

Writes chaos.md and result.json into --out. Exit codes: 0 equal, 1 not, 3 the run made no step for 15 minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from aer_megatron.sglang.server import ServerGroup
from aer_megatron.sglang.supervisor import Supervisor
from benchmarks.reliability.chaos_plan import draw_kills
from benchmarks.reliability.chaos_report import compare, write_report
from benchmarks.reliability.chaos_run import ChaosRun, Launching, Stalled
from benchmarks.reliability.process_tree import servers_below
from benchmarks.reliability.tiny_run import SERVER_LAUNCH, SERVER_SECTIONS, launch_command, servers_python, write_run
from tests.support.real_servers import real_server_options

RANKS = 2
CHECKPOINT_EVERY = 4
STEPS_PER_KILL = 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    given = parse(arguments)
    folder = given.out.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    run_file = write_run(folder, name="chaos", verifier="checksum", more=SERVER_SECTIONS)
    num_steps = given.steps or given.kills * STEPS_PER_KILL
    options: dict[str, Any] = {
        "run.num_steps": num_steps,
        "run.checkpoint_every": CHECKPOINT_EVERY,
        "run.keep_checkpoints": 2,
        "rewards.num_workers": 2,
        "rollout.engine": given.engine,
    }
    kills = draw_kills(given.kills, num_steps=num_steps, engine=given.engine, seed=given.seed)
    with ExitStack() as stack:
        if given.engine == "sglang":
            options |= {"rollout.staleness": given.staleness, "sglang.max_attempts": 20}
            if given.keep_servers:
                options |= {"sglang.urls": start_servers(folder, given.servers, stack)}
            else:
                python = servers_python(given.servers, folder)
                options |= {"sglang.num_servers": 2, "sglang.python": python, "sglang.max_restarts": 10_000}
        states = {}
        for name, of_run in (("straight", []), ("killed", kills)):
            command = functools.partial(
                launch_command, run_file, options | {"run.output_dir": str(folder / name / "run")}, ranks=RANKS
            )
            (folder / name).mkdir(exist_ok=True)
            launching = Launching(
                folder / name, run_file, command, servers=lambda: servers_below(os.getpid())
            )  # the run's, too
            try:
                states[name] = ChaosRun(launching, of_run).run()
            except Stalled as error:
                print(f"{name}: {error}", file=sys.stderr)
                return 3
    found = compare(folder, engine=given.engine, num_steps=num_steps)
    if len(states["killed"]["faults"]) < given.kills:
        found.append(f"only {len(states['killed']['faults'])} of {given.kills} kills were made before the run's end")
    return write_report(folder, states, found, dict(vars(given)) | {"steps": num_steps, "out": folder.name})


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder; one that holds an earlier part goes on")
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--engine", choices=("embedded", "sglang"), default="embedded")
    parser.add_argument("--staleness", type=int, default=0, help="of the asynchronous loop, with servers")
    parser.add_argument("--servers", choices=("real", "double"), default="real")
    parser.add_argument("--keep-servers", action="store_true", help="servers that outlive the run's launches")
    parser.add_argument("--steps", type=int, default=0, help=f"of the run; 0 = {STEPS_PER_KILL} per kill")
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    given = parser.parse_args(arguments)
    if given.staleness and given.engine != "sglang":
        parser.error("--staleness needs --engine sglang")
    return given


def start_servers(folder: Path, kind: str, stack: ExitStack) -> list[str]:
    """Returns the addresses of two servers that are started again whenever they end; ``stack`` ends them."""
    options = real_server_options(folder / "base", folder / "servers", **SERVER_LAUNCH)
    options = dataclasses.replace(options, python=servers_python(kind, folder), max_restarts=10_000)
    group = stack.enter_context(ServerGroup(2, options))
    urls = group.start()
    stack.enter_context(Supervisor(group)).watch(None)  # the run itself gives them its weights
    return urls


if __name__ == "__main__":
    sys.exit(main())

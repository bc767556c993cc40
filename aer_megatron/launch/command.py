"""Starts the ranks of a run, on this machine or on one of several: ``aer launch``.

    aer launch --nproc 2 RUN.toml --parallel.tp=2
    aer launch --nproc 2 doctor RUN.toml
    aer launch --nnodes 2 --node-rank 0 --nproc 8 --master-addr node0 --master-port 29400 RUN.toml

On one machine nothing of it can be reached from another one. See docs/launch.md.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from aer_megatron.console.command_line import CommandLine, Given, Option, whole
from aer_megatron.console.failures import print_message

_COMMANDS = ("train", "doctor", "evaluate", "replay-batch", "fp8-parity")  # of aer, which may run on several ranks
_ABOUT = """\
Starts the ranks of a run, on this machine or on one of several. PROGRAM is RUN.toml with its overrides, which is
trained; one of the commands train, doctor, evaluate, replay-batch, fp8-parity with its arguments; -m MODULE or
SCRIPT.py."""
_MORE_HELP = """
torchrun's spellings (--nproc-per-node, --node_rank, --rdzv-id, ...) work as well. SIGTERM, SIGINT and SIGUSR1 are
handed on to every rank, which finishes its step and saves; a second SIGTERM or SIGINT ends the ranks at once, a third
one kills them. Exit codes: 0, or that of the first rank that failed (2: configuration or data are wrong); 143, 130
and 0 after the signals."""


@dataclasses.dataclass(frozen=True, slots=True)
class LaunchOptions:
    """What the user asked for. Example: ``LaunchOptions(("-m", "aer_megatron.train", "run.toml"), nproc="2")``."""

    program: tuple[str, ...]
    nproc: str = "1"
    nnodes: int = 1
    node_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    run_id: str = "aer"
    join_timeout: float = 600.0
    shutdown_timeout: float = 10.0


def launch_options(given: Given, environment: Mapping[str, str]) -> LaunchOptions:
    """Returns the options, with what ``environment`` says of the machines where the arguments do not.

    Raises:
        ValueError: the program is missing, or the machines are not described.
    """
    options = LaunchOptions(
        _program(given.places),
        nproc=given["nproc"],
        nnodes=given["nnodes"],
        run_id=given["run-id"],
        join_timeout=given["join-timeout"],
        shutdown_timeout=given["shutdown-timeout"],
    )
    if options.nnodes > 1:
        return _one_of_several(options, given, environment)
    if given["node-rank"]:
        raise ValueError(f"--node-rank={given['node-rank']} needs --nnodes, which is 1; give the number of machines")
    return options  # an address is of no use to one machine: its store is on the loopback


def launch(options: LaunchOptions, environment: Mapping[str, str]) -> int:
    """Starts the ranks, waits for their end, prints the first failure, and returns the exit code of the launch.

    Raises:
        ValueError: the number of ranks is no number, or more than there are CUDA devices.
        RuntimeError: the machines do not find one another.
    """
    from aer_megatron.launch.agent import LaunchAgent, Nodes
    from aer_megatron.launch.rank_processes import RankProcesses

    ranks_here = number_of_ranks(options.nproc)
    nodes = Nodes(
        options.nnodes,
        options.node_rank,
        options.master_addr,
        options.master_port,
        run_id=options.run_id,
        join_timeout_s=options.join_timeout,
    )
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while machines wait for one another no Python code runs
    with tempfile.TemporaryDirectory(prefix="aer-launch-") as folder:
        processes = RankProcesses(options.program, Path(folder), options.shutdown_timeout)
        LaunchAgent(nodes, ranks_here, processes, _rank_environment(options, ranks_here, environment)).run()
    failure = processes.failure()
    message = failure.message if failure is not None else processes.stop_message()
    if message is not None:
        print_message(message)
    return processes.exit_code()


def _program(words: Sequence[str]) -> tuple[str, ...]:
    """Returns what the ranks run: ``-m MODULE`` or ``SCRIPT.py``, with its arguments."""
    if words[0] == "-m" and len(words) < 2:
        raise ValueError("-m needs the name of a module")
    if words[0] == "-m" or words[0].endswith(".py"):
        return tuple(words)
    if words[0] in _COMMANDS:
        return ("-m", "aer_megatron.cli", *words)
    return ("-m", "aer_megatron.train", *words)


def _one_of_several(options: LaunchOptions, given: Given, environment: Mapping[str, str]) -> LaunchOptions:
    """Returns the options, with which of several machines this is, and where the first one is."""
    found = dict(given.options)
    for name, variable in (
        ("master-addr", "MASTER_ADDR"),
        ("master-port", "MASTER_PORT"),
        ("node-rank", "SLURM_NODEID"),
    ):
        if found[name] is None and environment.get(variable):
            found[name] = next(each for each in COMMAND.options if each.name == name).value(environment[variable])
    flag = f"--nnodes={options.nnodes}"
    if found["master-addr"] is None:
        raise ValueError(f"{flag} needs --master-addr: the name of the machine of --node-rank 0")
    if found["node-rank"] is None:
        raise ValueError(f"{flag} needs --node-rank, the number of this machine from 0; srun gives it as SLURM_NODEID")
    if found["node-rank"] >= options.nnodes:
        raise ValueError(f"--node-rank={found['node-rank']} must be below {flag}; machines are counted from 0")
    port = 29400 if found["master-port"] is None else found["master-port"]
    return dataclasses.replace(
        options, node_rank=found["node-rank"], master_addr=found["master-addr"], master_port=port
    )


def _machines(text: str) -> int:
    if ":" in text:
        raise ValueError("must be a whole number: the number of machines is fixed")
    return whole(1)(text)


def _port(text: str) -> int:
    if not 1 <= whole()(text) <= 65535:
        raise ValueError("must lie between 1 and 65535")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e8:
        raise ValueError("must be a number of seconds, 0 or more")
    return value


def number_of_ranks(nproc: str) -> int:
    """Returns the ranks of this machine that ``--nproc`` asks for; a CUDA device takes one.

    Raises:
        ValueError: it is no number, or asks for more ranks than there are CUDA devices.
    """
    import torch

    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if nproc == "gpu" and not devices:
        raise ValueError("--nproc=gpu, but this machine has no CUDA device; give a number, or --nproc=cpu")
    if nproc == "gpu" or (nproc == "auto" and devices):
        return devices
    if nproc in ("cpu", "auto"):
        return len(os.sched_getaffinity(0))
    count: int = Option("nproc", "N", "", whole(1)).value(nproc)
    if devices and count > devices:
        raise ValueError(f"--nproc={count}, but this machine shows {devices} CUDA devices; give at most {devices}")
    return count


def _rank_environment(options: LaunchOptions, ranks_here: int, environment: Mapping[str, str]) -> dict[str, str]:
    defaults = {"PYTHONUNBUFFERED": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"}
    if ranks_here > 1:
        defaults["OMP_NUM_THREADS"] = "1"  # as torchrun: each rank would take every core
    if options.nnodes == 1:
        defaults["GLOO_SOCKET_IFNAME"] = "lo"  # nothing of one machine is open to others
    return defaults | dict(environment)


COMMAND = CommandLine(
    "launch",
    about=_ABOUT,
    run=lambda given, edge: launch(launch_options(given, os.environ), os.environ),
    place="PROGRAM",
    what="the run file, or what else the ranks run",
    overrides=False,
    is_launcher=True,
    options=(
        Option(
            "nproc",
            "N",
            "ranks on this machine: a number, gpu (one per CUDA device), cpu (one per core) or auto",
            default="1",
            aliases=("nproc-per-node",),
        ),
        Option("nnodes", "N", "machines", _machines, 1),
        Option("node-rank", "R", "of this machine, from 0 [SLURM_NODEID]", whole()),
        Option("master-addr", "NAME", "of the machine of node rank 0, as the others reach it [MASTER_ADDR]"),
        Option("master-port", "PORT", "a free port there, open to the others [MASTER_PORT, 29400]", _port),
        Option(
            "run-id",
            "NAME",
            "keeps apart launches that reach one another's address by mistake",
            default="aer",
            aliases=("rdzv-id",),
        ),
        Option("join-timeout", "S", "how long the machines wait for one another", _seconds, 600),
        Option("shutdown-timeout", "S", "how long the other ranks may go on when one has failed", _seconds, 10),
        Option("standalone", "", ""),  # torchrun's word for one machine
    ),
    hints={
        "--rdzv": "machines find one another by --master-addr, --master-port and --node-rank alone",
        "--dry-run": "options of the run come after the run file",
        "--stage": "options of the run come after the run file",
    },
    more_help=lambda: _MORE_HELP,
)
main = COMMAND.main

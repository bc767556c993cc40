"""Starts the ranks of a run, on this machine or on one of several: ``aer launch``.

    aer launch --nproc 2 RUN.toml --parallel.tp=2
    aer launch --nproc 2 -m aer_megatron.doctor RUN.toml
    aer launch --nnodes 2 --node-rank 0 --nproc 8 --master-addr node0 --master-port 29400 RUN.toml

On one machine nothing of it can be reached from another one. See docs/launch.md.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from aer_megatron.console.failures import print_message, run_command

USAGE = """\
usage: aer launch --nproc N [options] RUN.toml [--section.key=value ...]
       aer launch --nproc N [options] -m MODULE [arguments]
       aer launch --nproc N [options] SCRIPT.py [arguments]

  --nproc N              ranks on this machine: a number, gpu (one per CUDA device), cpu (one per core) or auto [1]
  --nnodes N             machines [1]
  --node-rank R          of this machine, from 0 [SLURM_NODEID]
  --master-addr NAME     of the machine of node rank 0, as the others reach it [MASTER_ADDR]
  --master-port PORT     a free port there, open to the others [MASTER_PORT, 29400]
  --run-id NAME          keeps apart launches that reach one another's address by mistake [aer]
  --join-timeout S       how long the machines wait for one another [600]
  --shutdown-timeout S   how long the other ranks may go on when one has failed [10]
  --help                 this text

torchrun's spellings (--nproc-per-node, --node_rank, --rdzv-id, ...) work as well. SIGTERM, SIGINT and SIGUSR1 are
handed on to every rank, which finishes its step and saves; a second SIGTERM or SIGINT ends the ranks at once, a third
one kills them. Exit codes: 0, or that of the first rank that failed (2: configuration or data are wrong); 143, 130
and 0 after the signals.
"""

_ALIASES = {"nproc-per-node": "nproc", "rdzv-id": "run-id"}
_TRAIN = ("-m", "aer_megatron.train")


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code of one launch."""
    given = sys.argv[1:] if arguments is None else arguments
    if not given or given[0] in ("--help", "-h"):
        print(USAGE)
        return 0
    return run_command(lambda edge: launch(parse_command_line(given, os.environ), os.environ), is_launcher=True)


def parse_command_line(arguments: Sequence[str], environment: Mapping[str, str]) -> LaunchOptions:
    """Returns the options, with what ``environment`` says of the machines where the arguments do not.

    Raises:
        ValueError: an argument is not understood, has no value or a wrong one, or the machines are not described.
    """
    given, program = _split(arguments)
    one = LaunchOptions(program)
    options = LaunchOptions(
        program,
        nproc=given.get("nproc", one.nproc),
        nnodes=_whole(given, "nnodes", one.nnodes, 1),
        run_id=given.get("run_id", one.run_id),
        join_timeout=_seconds(given, "join_timeout", one.join_timeout),
        shutdown_timeout=_seconds(given, "shutdown_timeout", one.shutdown_timeout),
    )
    if options.nnodes > 1:
        return _one_of_several(options, given, environment)
    if _whole(given, "node_rank", 0, 0) != 0:
        raise ValueError(f"--node-rank={given['node_rank']} needs --nnodes, which is 1; give the number of machines")
    return options  # an address is of no use to one machine: its store is on the loopback


def launch(options: LaunchOptions, environment: Mapping[str, str]) -> int:
    """Returns the exit code of the launch, after its last words; every rank has ended then.

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


def _split(arguments: Sequence[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Returns the launch's options by field, and what the ranks run."""
    names = {field.name for field in dataclasses.fields(LaunchOptions)} - {"program"}
    given: dict[str, str] = {}
    rest = list(arguments)
    while rest and rest[0].startswith("--"):
        flag, separator, value = rest.pop(0).partition("=")
        spelling = flag[2:].replace("_", "-")
        name = _ALIASES.get(spelling, spelling).replace("-", "_")
        if name == "standalone" and not separator:
            continue  # torchrun's word for one machine
        if name not in names:
            raise ValueError(_unknown(flag, {*names, *_ALIASES}))
        if not separator:
            if not rest:
                raise ValueError(f"{flag} needs a value; see aer launch --help")
            value = rest.pop(0)
        given[name] = value
    if rest[:1] == ["-m"]:
        if len(rest) < 2:
            raise ValueError("-m needs the name of a module")
        return given, tuple(rest)
    if not rest:
        raise ValueError("the run file is missing; give aer launch --nproc N RUN.toml, see aer launch --help")
    return given, tuple(rest) if rest[0].endswith(".py") else (*_TRAIN, *rest)


def _unknown(flag: str, names: set[str]) -> str:
    text = f"{flag} is no option of aer launch"
    if "." in flag or flag in ("--dry-run", "--stage"):
        return f"{text}; options of the run come after the run file"
    if flag.startswith("--rdzv"):
        return f"{text}: machines find one another by --master-addr, --master-port and --node-rank alone"
    near = difflib.get_close_matches(flag[2:].replace("-", "_"), [name.replace("-", "_") for name in names], n=1)
    return f"{text}; did you mean --{near[0].replace('_', '-')}?" if near else f"{text}; see aer launch --help"


def _one_of_several(options: LaunchOptions, given: Mapping[str, str], environment: Mapping[str, str]) -> LaunchOptions:
    """Returns the options, with which of several machines this is, and where the first one is."""
    variables = {"master_addr": "MASTER_ADDR", "master_port": "MASTER_PORT", "node_rank": "SLURM_NODEID"}
    found = {name: environment[variable] for name, variable in variables.items() if environment.get(variable)}
    found |= given
    flag = f"--nnodes={options.nnodes}"
    if "master_addr" not in found:
        raise ValueError(f"{flag} needs --master-addr: the name of the machine of --node-rank 0")
    if "node_rank" not in found:
        raise ValueError(f"{flag} needs --node-rank, the number of this machine from 0; srun gives it as SLURM_NODEID")
    node_rank = _whole(found, "node_rank", 0, 0)
    if node_rank >= options.nnodes:
        raise ValueError(f"--node-rank={node_rank} must be below {flag}; machines are counted from 0")
    port = _whole(found, "master_port", 29400, 1)
    if port > 65535:
        raise ValueError(f"--master-port={port} must lie between 1 and 65535")
    return dataclasses.replace(options, node_rank=node_rank, master_addr=found["master_addr"], master_port=port)


def _whole(given: Mapping[str, str], name: str, default: int, least: int) -> int:
    text = given.get(name, str(default))
    flag = f"--{name.replace('_', '-')}={text}"
    if not (text.isascii() and text.isdigit() and len(text) < 8):
        hint = ": the number of machines is fixed" if name == "nnodes" and ":" in text else ""
        raise ValueError(f"{flag} must be a whole number{hint}")
    if int(text) < least:
        raise ValueError(f"{flag} must be at least {least}")
    return int(text)


def _seconds(given: Mapping[str, str], name: str, default: float) -> float:
    text = given.get(name, str(default))
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e8:
        raise ValueError(f"--{name.replace('_', '-')}={text} must be a number of seconds, 0 or more")
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
    count = _whole({"nproc": nproc}, "nproc", 1, 1)
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


if __name__ == "__main__":
    sys.exit(main())

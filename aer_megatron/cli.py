"""The command ``aer``: one table of subcommands, each a module with ``main(arguments) -> exit code``.

    aer launch --nproc 2 RUN.toml --parallel.tp=2
    aer --help

A module is imported when its command is called, so that the help needs none of them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from aer_megatron.console.failures import print_message

COMMANDS = {
    "launch": (
        "aer_megatron.launch.command",
        "start the ranks of a run, or of another module, on this machine or several",
    ),
    "train": ("aer_megatron.train", "train in this process alone; what every rank of a launch runs"),
    "verify-resume": (
        "aer_megatron.verify_resume.command",
        "show that a run goes on from its checkpoint as if never stopped",
    ),
    "replay-batch": ("aer_megatron.replay.batch", "compute a kept batch of a run again, with its seed"),
}

USAGE = "usage: aer COMMAND [arguments]        aer COMMAND --help"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code of one command; 2 for a command that is not known."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("--help", "-h"):
        width = max(map(len, COMMANDS))
        print("\n".join([USAGE, "", *(f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items())]))
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        print_message(f"aer {name} is no command; use one of {', '.join(COMMANDS)}")
        return 2
    code: int = importlib.import_module(COMMANDS[name][0]).main(rest)
    return code


if __name__ == "__main__":
    sys.exit(main())

"""The command ``aer``: one table of commands, each a module with ``main(arguments) -> exit code``.

    aer launch --nproc 2 RUN.toml --parallel.tp=2
    aer --help

A module is imported when its command is called, so that the help needs none of them. Where the script ``aer`` is not
installed, ``python -m aer_megatron.cli`` is the same.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from aer_megatron.console.failures import print_message

# what a user wants -> command -> (module, what it does)
COMMANDS = {
    "before a run": {
        "data": ("aer_megatron.prepare_data.command", "take known sets, check and decontaminate problems"),
        "plan": ("aer_megatron.plan.command", "memory per GPU, work of a step and the layouts that fit"),
        "doctor": ("aer_megatron.doctor.command", "do every layout, transformers and the engine agree?"),
        "verify-resume": ("aer_megatron.verify_resume.command", "is nothing lost when it is stopped and goes on?"),
    },
    "the run": {
        "launch": ("aer_megatron.launch.command", "start its ranks, here or on several machines"),
        "train": ("aer_megatron.train", "train in one process; --dry-run says what is wrong, and stops"),
    },
    "what it did": {
        "evaluate": ("aer_megatron.evaluate.command", "pass@k and maj@k of a policy on evaluation sets"),
        "compare": ("aer_megatron.evaluate.compare_command", "two evaluations: differences, intervals, p-values"),
        "report": ("aer_megatron.report.command", "draw one run, or several over one another"),
        "samples": ("aer_megatron.samples.command", "texts that the policy wrote, coloured by their entropy"),
        "replay": ("aer_megatron.replay.command", "another entropy controller on a recorded run"),
        "replay-batch": ("aer_megatron.replay.batch", "a kept update again: where it is not finite"),
        "fp8-parity": ("aer_megatron.fp8_parity.command", "what FP8 changes, recipe by recipe"),
    },
    "its checkpoints": {
        "convert": ("aer_megatron.conversion.command", "Hugging Face, Megatron-Core and FP8 folders; is nothing lost?"),
        "export-ledger": ("aer_megatron.report.ledger_csv", "what every prompt gave so far, as CSV"),
    },
}

_USAGE = "usage: aer COMMAND [arguments], aer COMMAND --help"
_MORE = """\
--section.key=value overrides an option of the run file; aer train --help lists
all. On several ranks, also evaluate: aer launch --nproc 2 doctor RUN.toml"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command, and returns its exit code; 2 for a command that is not known."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("--help", "-h"):
        print(help_text())
        return 0
    modules = {name: module for group in COMMANDS.values() for name, (module, _) in group.items()}
    name, *rest = arguments
    if name not in modules:
        near = difflib.get_close_matches(name, modules, n=1)
        hint = f"did you mean aer {near[0]}?" if near else f"use one of {', '.join(modules)}"
        print_message(f"aer {name} is no command; {hint}")
        return 2
    code: int = importlib.import_module(modules[name]).main(rest)
    return code


def help_text() -> str:
    """Returns the commands by what a user wants."""
    lines = [_USAGE]
    for want, group in COMMANDS.items():
        lines += [want, *(f"  {name:15}{text}" for name, (_, text) in group.items())]
    return "\n".join([*lines, "", _MORE])


if __name__ == "__main__":
    sys.exit(main())

"""Compares two evaluations of the same problems: ``aer compare``.

    aer compare base.json runs/math/evaluate.json
    aer compare A.json B.json --format latex

Exit codes: 0 done, 2 a file is none, or the two are of different problems.
"""

from __future__ import annotations

from pathlib import Path

from aer_megatron.console.command_line import CommandLine, Given, Option, whole
from aer_megatron.console.failures import Edge
from aer_megatron.console.standard_streams import say
from aer_megatron.evaluate.command import FORMAT


def _run(given: Given, edge: Edge) -> int:
    from aer_megatron.evaluate.comparison import compare
    from aer_megatron.evaluate.result import read_result
    from aer_megatron.evaluate.tables import change_rows, difference_rows, render

    files = Path(given.places[0]), Path(given.places[1])
    differences, changes = compare(read_result(files[0]), read_result(files[1]), files)
    say(render(*difference_rows(differences), given["format"]))
    gained = sum(change.gained for change in changes)
    say(f"\n{gained} problems gained and {len(changes) - gained} lost: half of the samples right in one of the two")
    if changes and given["problems"]:
        say("\n" + render(*change_rows(changes[: given["problems"]]), given["format"]))
        if len(changes) > given["problems"]:
            say(f"... {len(changes) - given['problems']} more: --problems N")
    return 0


COMMAND = CommandLine(
    "compare",
    about="Compares two results of aer evaluate problem by problem: B - A of every measure with a 95 % interval and "
    "the p-value of a sign-flip permutation test, and the problems that changed sides.",
    run=_run,
    place="A.json B.json",
    what="results of aer evaluate, of the same sets, temperatures and problems",
    overrides=False,
    options=(FORMAT, Option("problems", "N", "problems that changed sides, at most", whole(), 20)),
)
main = COMMAND.main

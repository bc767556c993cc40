"""Draws one run, or several over one another: ``aer report RUN [RUN ...]``."""

from __future__ import annotations

from pathlib import Path

from aer_megatron.console.command_line import CommandLine, Given, Option
from aer_megatron.console.failures import Edge


def _draw(given: Given, edge: Edge) -> int:
    from aer_megatron.report.picture import draw_comparison, draw_report  # matplotlib takes half a second

    runs, output = [Path(run) for run in given.places], given["output"]
    if output is None and len(runs) == 1:
        print(draw_report(runs[0]))
    else:
        print(draw_comparison(runs, output or Path("comparison.png")))
    return 0


COMMAND = CommandLine(
    "report",
    about="Draws reward, pass@k, entropy and coefficient of one run, or of several over one another.",
    run=_draw,
    place="RUN",
    what="the run folder, which holds metrics.jsonl",
    overrides=False,
    several_places=True,
    options=(Option("output", "FILE", "the picture [RUN/report.png; for several runs comparison.png here]", Path),),
)
main = COMMAND.main

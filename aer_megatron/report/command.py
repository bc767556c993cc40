"""Draws one run, or several over one another: ``aer report RUN [RUN ...]``, as a page, a picture, or served."""

from __future__ import annotations

from pathlib import Path

from aer_megatron.console.command_line import CommandLine, Given, Option, whole
from aer_megatron.console.failures import Edge


def _draw(given: Given, edge: Edge) -> int:
    runs, output = [Path(run) for run in given.places], given["output"]
    if given["serve"]:
        return _serve(runs, given["port"])
    if given["png"]:
        from aer_megatron.report.picture import PICTURE_FILE, draw_comparison  # matplotlib takes half a second

        print(draw_comparison(runs, output or (runs[0] / PICTURE_FILE if len(runs) == 1 else Path("comparison.png"))))
        return 0
    from aer_megatron.report.html import HTML_FILE, write_html

    print(write_html(runs, output or runs[0] / HTML_FILE))
    return 0


def _serve(runs: list[Path], port: int) -> int:
    """Serves until the process is stopped."""
    from aer_megatron.report.serving import ReportServer

    try:
        server = ReportServer(runs, port)
    except OSError as error:
        raise RuntimeError(f"port {port} cannot be served ({error}); give another one by --port") from None
    with server:
        server.page()  # a folder that is no run is said now
        print(server.address, flush=True)
        server.serve_forever()
    return 0


COMMAND = CommandLine(
    "report",
    about="Draws one run, or several over one another, as one page that needs nothing else: RUN/report.html.",
    run=_draw,
    place="RUN",
    what="the run folder, which holds metrics.jsonl",
    overrides=False,
    several_places=True,
    options=(
        Option("output", "FILE", "the page or the picture [report.html in the first run]", Path),
        Option("png", "", "a picture for papers: RUN/report.png, for several runs comparison.png here"),
        Option("serve", "", "serve the page on this machine alone; it follows the runs"),
        Option("port", "PORT", "of --serve; 0 takes a free one", whole(), 8765),
    ),
)
main = COMMAND.main

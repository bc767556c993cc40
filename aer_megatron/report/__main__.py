"""``python -m aer_megatron.report RUN [RUN ...]``: draws one run, or several over one another."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from aer_megatron.console.failures import run_command
from aer_megatron.report.picture import PICTURE_FILE, draw_comparison, draw_report


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 where a folder is not a run."""
    parser = argparse.ArgumentParser(
        prog="python -m aer_megatron.report",
        description="Draw reward, pass@k, entropy and coefficient of one run, or of several over each other.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder that holds metrics.jsonl")
    parser.add_argument(
        "--output",
        type=Path,
        help=f"picture to write; without it RUN/{PICTURE_FILE}, or comparison.png here for several runs",
    )
    options = parser.parse_args(arguments)
    return run_command(lambda edge: _draw(options.runs, options.output))


def _draw(runs: Sequence[Path], output: Path | None) -> int:
    if output is None and len(runs) == 1:
        print(draw_report(runs[0]))
    else:
        print(draw_comparison(runs, output or Path("comparison.png")))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Writes a difficulty ledger as CSV, one prompt per line: ``aer export-ledger CHECKPOINT OUT.csv``."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aer_megatron._C import DifficultyLedger
from aer_megatron.algo.options import LedgerSection
from aer_megatron.console.command_line import CommandLine, Given, Option
from aer_megatron.console.failures import Edge
from aer_megatron.console.standard_streams import say

LEDGER_NAME = "ledger"  # of the part in a checkpoint folder (train.py)
COLUMNS = (
    "prompt_id",
    "attempts",
    "successes",
    "accuracy",
    "posterior_mean",
    "decayed_successes",
    "decayed_failures",
    "last_step",
    "token_entropy_mean",
    "response_length_mean",
)


def load_ledger(source: Path) -> DifficultyLedger:
    """Returns the ledger of a file or a checkpoint folder.

    Raises:
        ValueError: ``source`` does not exist, or is a folder without a ledger, or its content is no whole ledger.
    """
    path = source / LEDGER_NAME if source.is_dir() else source
    if not path.is_file():
        what = f"the folder {source} has no file {LEDGER_NAME!r}" if source.is_dir() else f"{source} does not exist"
        raise ValueError(f"{what}; give a ledger file or a checkpoint folder (OUTPUT_DIR/checkpoints/step_N)")
    return DifficultyLedger.load(str(path))


def rows(ledger: DifficultyLedger, *, prior_success: float, prior_failure: float) -> Iterator[tuple[object, ...]]:
    """Yields one row of ``COLUMNS`` per prompt, sorted by prompt id."""
    table = ledger.export()
    newest = int(table.last_step.max()) if len(table) else 0
    mean = ledger.posterior_mean(
        table.prompt_ids, prior_success=prior_success, prior_failure=prior_failure, step=newest
    )
    yield from zip(
        (f"{prompt_id:016x}" for prompt_id in table.prompt_ids.tolist()),
        table.attempts.tolist(),
        table.successes.tolist(),
        _ratio(table.successes, table.attempts),
        mean.tolist(),
        table.decayed_successes.tolist(),
        table.decayed_failures.tolist(),
        table.last_step.tolist(),
        _ratio(table.entropy_sum, table.token_count),
        _ratio(table.token_count, table.attempts),
        strict=True,
    )


def _ratio(numerator: NDArray[np.generic], denominator: NDArray[np.int64]) -> Iterator[float | str]:
    for above, below in zip(numerator.tolist(), denominator.tolist(), strict=True):
        yield above / below if below else ""


def write_csv(path: Path, lines: Iterator[tuple[object, ...]]) -> int:
    """Returns the number of lines below the header; ``path`` is replaced at once or, on an error, not at all."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    count = 0
    try:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            for line in lines:
                writer.writerow(line)
                count += 1
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def _export(given: Given, edge: Edge) -> int:
    if len(given.places) != 2:
        raise ValueError(f"aer export-ledger takes CHECKPOINT OUT.csv, and {len(given.places)} were given")
    source, output = map(Path, given.places)
    ledger = load_ledger(source)
    if not output.absolute().parent.is_dir():
        raise ValueError(f"the folder of {output} does not exist; make it or name another one")
    lines = rows(ledger, prior_success=given["prior-success"], prior_failure=given["prior-failure"])
    say(f"{output}: {write_csv(output, lines)} prompts")
    return 0


_DEFAULTS = LedgerSection()
_COLUMNS_TEXT = """
columns: prompt_id (16 hex digits), attempts, successes, accuracy (successes / attempts), posterior_mean (of the Beta
posterior at the ledger's newest step), decayed_successes and decayed_failures (as of last_step), last_step,
token_entropy_mean (nats per sampled token), response_length_mean (sampled tokens per response). A ratio without a
denominator is left empty; numbers are written in full."""
COMMAND = CommandLine(
    "export-ledger",
    about="Writes a difficulty ledger as CSV, one prompt per line, sorted by prompt id: attempts, successes, posterior "
    "mean, entropy and length of its responses.",
    run=_export,
    place="CHECKPOINT OUT.csv",
    what="checkpoint folder (RUN/checkpoints/step_N) or ledger file; and the table",
    overrides=False,
    several_places=True,
    options=(
        Option("prior-success", "A", "of the Beta posterior", float, _DEFAULTS.prior_success),
        Option("prior-failure", "B", "of the Beta posterior", float, _DEFAULTS.prior_failure),
    ),
    more_help=lambda: _COLUMNS_TEXT,
)
main = COMMAND.main

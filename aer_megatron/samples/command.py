"""Shows what the policy wrote: ``aer samples RUN [--step 10-20] [--reason correct] [--grep REGEX]``."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator
from operator import attrgetter
from pathlib import Path

import regex
from rich.console import Console
from rich.text import Text

from aer_megatron.console.command_line import CommandLine, Given, Option, whole
from aer_megatron.console.escaping import visible
from aer_megatron.console.failures import Edge
from aer_megatron.report.samples import Sample
from aer_megatron.samples.selection import SEARCH_LIMIT_S, Selection, select
from aer_megatron.samples.view import legend, mean_entropy, sample_text

_LIMIT = 10
_MAX_REASONS = 12


def _run(given: Given, edge: Edge) -> int:
    wanted = Selection(given["step"], given["set"], given["reason"], given["grep"], given["unsolved"])
    reasons = Counter[str]()
    matching = _counted(select(Path(given.place), wanted), reasons)
    if given["most-entropy"]:
        which, shown = "most uncertain", heapq.nlargest(given["limit"], matching, key=mean_entropy)
    else:
        which, shown = "newest", heapq.nlargest(given["limit"], matching, key=attrgetter("step"))
        shown.sort(key=attrgetter("step"))
    console = Console(soft_wrap=True)  # what is piped has the lines of the text
    if console.color_system is not None and any(sample.token_entropy for sample in shown):
        console.print(legend())
    for sample in shown:
        console.print(sample_text(sample))
    console.print(Text(_summary(reasons, len(shown), which)))
    return 0


def _counted(samples: Iterable[Sample], reasons: Counter[str]) -> Iterator[Sample]:
    for sample in samples:
        reasons[sample.reason] += 1
        yield sample


def _summary(reasons: Counter[str], num_shown: int, which: str) -> str:
    """Returns how many samples match, how many have each reason, and which are shown."""
    if not reasons:
        return "no sample matches"
    kinds = ", ".join(f"{visible(reason, keep='')} {count}" for reason, count in reasons.most_common(_MAX_REASONS))
    more = f"; these are the {num_shown} {which} (--limit)" if num_shown < reasons.total() else ""
    return f"matching samples {reasons.total()}: {kinds}{more}"


def _steps(text: str) -> range:
    first, dash, last = text.partition("-")
    try:
        start, end = whole()(first), whole()(last if dash else first)
    except ValueError:
        raise ValueError("must be a step, 12, or the first and the last of several, 10-20") from None
    if end < start:
        raise ValueError("must have its first step before its last one")
    return range(start, end + 1)


def _pattern(text: str) -> regex.Pattern[str]:
    try:
        return regex.compile(text, regex.MULTILINE)
    except regex.error as error:
        raise ValueError(f"is no regular expression: {error}") from None


COMMAND = CommandLine(
    "samples",
    about="Shows what the policy wrote in a run, the newest texts last: reward, reason, prompt, expected answer, and "
    "the completion with its tokens coloured by their entropy. Characters that would do something to the terminal are "
    "shown as their escapes. The last line counts the reasons of all samples that match.",
    run=_run,
    place="RUN",
    what="the run folder, which holds samples/",
    overrides=False,
    options=(
        Option("step", "N|A-B", "of one step, or of steps A to B", _steps),
        Option("set", "NAME", "of an evaluation set, or of train; may be given several times", repeated=True),
        Option("reason", "NAME", "with this reason of the verdict; may be given several times", repeated=True),
        Option("unsolved", "", "of prompts to which no kept answer of the step is right"),
        Option(
            "grep",
            "REGEX",
            "completions in which a regular expression is found, ^ and $ at line ends; an error where the search of "
            f"one takes more than {SEARCH_LIMIT_S:g} s",
            _pattern,
        ),
        Option("most-entropy", "", "those of the highest mean token entropy, the highest first"),
        Option("limit", "N", "how many are shown", whole(1), _LIMIT),
    ),
)
main = COMMAND.main

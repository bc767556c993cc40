"""Which samples of a run are looked at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import regex

from aer_megatron.report.samples import Sample, read_samples

SEARCH_LIMIT_S = 2.0  # of processor time, for one completion

_RIGHT = 1.0  # the least reward of a right answer, as in pass@k and the ledger


@dataclass(frozen=True, slots=True)
class Selection:
    """What a sample must have to be shown; what is None or empty asks for nothing.

    Example: ``Selection(steps=range(10, 21), reasons=("correct",), pattern=regex.compile(r"\\\\boxed\\{\\}"))``.
    """

    steps: range | None = None
    sets: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    pattern: regex.Pattern[str] | None = None  # is found in the completion
    unsolved: bool = False  # no kept answer to its prompt in its step is right


def select(folder: Path, wanted: Selection) -> Iterator[Sample]:
    """Yields the samples of the run in ``folder`` that fit, in the order of their files.

    Raises:
        ValueError: the run has no samples, a file is damaged, or a search takes too long.
    """
    solved = (
        {_question(sample) for sample in _read(folder, wanted) if sample.reward >= _RIGHT} if wanted.unsolved else ()
    )
    for sample in _read(folder, wanted):
        if wanted.reasons and sample.reason not in wanted.reasons:
            continue
        if _question(sample) in solved:
            continue
        if wanted.pattern is None or _found(wanted.pattern, sample):
            yield sample


def _read(folder: Path, wanted: Selection) -> Iterator[Sample]:
    return read_samples(folder, steps=wanted.steps, sets=wanted.sets or None)


def _question(sample: Sample) -> tuple[int, str, int, int]:
    return sample.step, sample.set, sample.group, sample.prompt_id


def _found(pattern: regex.Pattern[str], sample: Sample) -> bool:
    try:
        return pattern.search(sample.completion, timeout=SEARCH_LIMIT_S) is not None
    except TimeoutError:
        raise ValueError(
            f"--grep={pattern.pattern} takes more than {SEARCH_LIMIT_S:g} s on one completion of step {sample.step}; "
            "give a pattern without repeats inside of repeats"
        ) from None

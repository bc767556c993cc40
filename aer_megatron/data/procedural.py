"""Problems of reasoning-gym's generators, checked for being usable as rewards.

This file does NOT score model answers: rewards/reasoning_gym.py does.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any, NamedTuple

from aer_megatron.options.data import SourceSection

PREFIX = "reasoning_gym:"
_NUM_CHECKED = 3


class ProceduralItem(NamedTuple):
    problem: str
    answer: str
    metadata: Mapping[str, Any]  # {"item": ..., "options": ...}: what its scorer needs


def generate(source: SourceSection) -> list[ProceduralItem]:
    """Returns ``source.size`` items of the reasoning-gym generator that ``source.task`` names.

    Raises:
        ValueError: the task is unknown, an option is, or the generator cannot serve as a reward: it does not
            score its own answer as 1, or scores any text as 1.
    """
    name = (source.task or "").removeprefix(PREFIX)
    if not (source.task or "").startswith(PREFIX) or not name:
        raise ValueError(f"task={source.task!r} is unknown; use 'countdown' or 'reasoning_gym:NAME'")
    # a large optional package, needed by this source only
    from reasoning_gym import create_dataset
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        raise ValueError(f"task={source.task!r} is unknown; reasoning-gym has {', '.join(sorted(DATASETS))}")
    try:
        dataset = create_dataset(name, size=source.size, seed=source.seed, **source.options)
    except (TypeError, AssertionError, ValueError) as error:
        raise ValueError(f"options={source.options} do not suit task={source.task!r}: {error}") from None
    for item in islice(dataset, _NUM_CHECKED):
        _check_scorer(dataset, item, source.task or "")
    return [_to_item(item, source.options) for item in islice(dataset, source.size)]


def _to_item(item: Mapping[str, Any], options: Mapping[str, Any]) -> ProceduralItem:
    return ProceduralItem(item["question"], str(item["answer"]), {"item": item, "options": options})


def _check_scorer(dataset: Any, item: Mapping[str, Any], task: str) -> None:
    if not isinstance(item["answer"], str) or dataset.score_answer(item["answer"], item) < 1.0:
        raise ValueError(f"task={task!r} cannot be a reward: it does not score its own answer as 1; use another task")
    if dataset.score_answer("no such answer", item) >= 1.0:
        raise ValueError(f"task={task!r} cannot be a reward: it scores any text as 1; use another task")

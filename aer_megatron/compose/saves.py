"""When a checkpoint cannot be written: the run says so loudly, goes on, and tries the next one.

A long run does not die of a disk that is full for an hour: the checkpoint before stays, and every save is a new try.
Only the last one must be there: without it the run ends in an error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from aer_megatron.actor.actor import Actor
from aer_megatron.checkpoint.folder import ChooseBest
from aer_megatron.checkpoint.save import Writer
from aer_megatron.checkpoint.store import CheckpointStore, SaveError
from aer_megatron.config import Config
from aer_megatron.loop.parts import Progress
from aer_megatron.report.metrics import Metric, of_set
from aer_megatron.report.writer import read_metrics

_LOG = logging.getLogger(__name__)
_LAST_CHANCE_S = 60.0  # for a save that is under way when the run ends in an error


def check_best(config: Config) -> None:
    """Raises ValueError unless ``run.keep_best`` is a score of a set that the run evaluates: higher is better."""
    scores = [
        of_set(name, measure, k)
        for name, each in config.eval.sets.items()
        if each.every
        for measure, ks in (("pass@K", each.k), ("maj@K", each.k), ("avg@K", (each.num_samples,)))
        for k in ks
    ]
    if config.run.keep_best and config.run.keep_best not in scores:
        known = f"use one of {', '.join(scores)}" if scores else "add a set to [eval.sets]"
        raise ValueError(f"run.keep_best={config.run.keep_best!r} is no score of an evaluation set; {known}")


def best_step(metrics_file: Path, metric: str) -> ChooseBest:
    """Returns what chooses the step whose record has the highest ``metric``, the latest of equals.

    The record of a step evaluates the policy of the checkpoint with that number. Raises ValueError when it is called
    and metrics.jsonl is damaged.
    """

    def choose(steps: Collection[int]) -> int | None:
        found = {record[Metric.STEP]: record.get(metric) for record in read_metrics(metrics_file)}
        scores = [(score, step) for step in steps if isinstance(score := found.get(step), float)]
        return max(scores)[1] if scores else None

    return choose


class RunSaves:
    """Saves one run. ``state_of`` and ``files_of`` give what a checkpoint holds beside the actor.

    ``files_of`` is called at once and returns functions that may be called while training goes on.
    """

    def __init__(
        self,
        store: CheckpointStore,
        actor: Actor,
        state_of: Callable[[Progress], Mapping[str, Any]],
        files_of: Callable[[], Mapping[str, Writer]],
        *,
        beside: bool,
        speaks: bool,
    ) -> None:
        """``beside``: training goes on while a checkpoint is written; ``speaks``: this rank is the one that warns."""
        self._store = store
        self._actor = actor
        self._state_of = state_of
        self._files_of = files_of
        self._beside = beside
        self._speaks = speaks
        self._begun = 0  # step of the save that was tried last
        self._unwritten = ""  # why that one is not there
        self.num_failed = 0

    def save(self, progress: Progress) -> None:
        """Begins a checkpoint, after the one before it is finished; warns where one cannot be written."""
        self._settle()
        self._begun, self._unwritten = progress.next_step, ""
        try:
            self._store.begin(
                self._actor,
                step=progress.next_step,
                state=self._state_of(progress),
                files=self._files_of(),
                beside=self._beside,
            )
        except SaveError as error:
            self._note(error)
        if not self._beside:
            self._settle()

    def finish(self) -> None:
        """Waits until the checkpoint that was begun last is on disk.

        Raises:
            RuntimeError: on every rank, where it could not be written.
        """
        self._settle()
        if self._unwritten:
            raise RuntimeError(
                f"the checkpoint of step {self._begun}, the last of this run, is not written: {self._unwritten}; the "
                f"newest is {self._store.newest()}, from which the same command goes on"
            )

    def _settle(self) -> None:
        try:
            self._store.wait()
        except SaveError as error:
            self._note(error)

    def _note(self, error: SaveError) -> None:
        self.num_failed += 1
        self._unwritten = str(error)
        if self._speaks:
            _LOG.error(
                "CHECKPOINT OF STEP %d NOT WRITTEN: %s; the newest is %s; training goes on, the next save tries again",
                self._begun,
                error,
                self._store.newest(),
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Lets a save that is under way end, however the run ended."""
        self._store.give_up(_LAST_CHANCE_S)

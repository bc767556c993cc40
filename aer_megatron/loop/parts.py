"""What a run is made of, as the training loops see it: the parts that compose/ chooses, and where a run stands.

This file does NOT hold behaviour.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from aer_megatron._C import DifficultyLedger
from aer_megatron.algo.controller import ControllerState
from aer_megatron.algo.flight import FlightRecord
from aer_megatron.options.data import EvalSetSection
from aer_megatron.report.reporter import StepReporter
from aer_megatron.report.timer import PhaseTimer
from aer_megatron.types import (
    Experience,
    Float32Array,
    Float64Array,
    PolicyScores,
    Prompt,
    RolloutGroup,
    ScoredGroup,
    StepStats,
    TrainBatch,
)

T = TypeVar("T")


class PromptSource(Protocol):
    def next_prompts(self, count: int) -> list[Prompt]: ...
    def select_prompts(
        self, count: int, *, accept: Callable[[Any], Any], max_rejected: int
    ) -> tuple[list[Prompt], int]: ...
    def prompts_of(self, ids: Sequence[int]) -> list[Prompt]: ...
    def state_dict(self) -> dict[str, int]: ...


class Collector(Protocol):
    def collect(
        self, prompts_P: Sequence[Prompt], *, step: int, refill: int, num_groups: int | None = None
    ) -> list[RolloutGroup]: ...


class Policy(Protocol):
    def score(self, experience: Experience, *, seed: int) -> PolicyScores: ...
    def score_reference(self, experience: Experience) -> Float32Array: ...
    def train(self, batch: TrainBatch, *, seed: int, entropy_gradient: bool) -> StepStats: ...
    def hf_weights(self) -> Iterator[tuple[str, Any]]: ...


class WeightSync(Protocol):
    def publish(self, named_tensors: Iterator[tuple[str, Any]], version: int) -> None: ...
    def suspend(self) -> None: ...


class FlightRecorder(Protocol):
    def write(self, record: FlightRecord) -> None: ...


@dataclass(frozen=True, slots=True)
class PendingBatch:
    """Prompts that were drawn for a later step and not trained on yet; a resumed run generates for them afresh."""

    step: int
    prompt_ids: tuple[int, ...]
    num_skipped: int


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands between two steps: what a checkpoint holds beside weights, optimizer and ledger.

    ``cursor`` lies behind the prompts of ``pending``.
    """

    next_step: int
    policy_version: int
    controller_state: ControllerState
    cursor: Mapping[str, int]
    pending: tuple[PendingBatch, ...] = ()


class Saves(Protocol):
    """Writes checkpoints, perhaps while training goes on; one that cannot be written is said and tried anew later."""

    num_failed: int

    def save(self, progress: Progress) -> None: ...
    def finish(self) -> None: ...


class NoSaves:
    """Keeps nothing: for a loop that is only measured."""

    num_failed = 0

    def save(self, progress: Progress) -> None:
        """Does nothing."""

    def finish(self) -> None:
        """Does nothing."""


class Votes(Protocol):
    """Returns the probability that the most frequent answer of k samples is right, per problem of all ranks, by k."""

    def __call__(self, scored: Sequence[ScoredGroup], ks: Sequence[int], /) -> Mapping[int, Float64Array]: ...


class Begin(Protocol):
    """Begins a work, now or later, here or beside, and returns what waits for its result."""

    def __call__(self, work: Callable[[], T], /) -> Callable[[], T]: ...


def when_waited(work: Callable[[], T]) -> Callable[[], T]:
    """Returns ``work`` itself: it begins when its result is waited for."""
    return work


def at_once(work: Callable[[], T]) -> Callable[[], T]:
    """Does the work here and now."""
    result = work()
    return lambda: result


@dataclass(frozen=True, slots=True)
class EvaluationSet:
    """A set of ``[eval.sets]``: its options, its problems and what samples their answers."""

    name: str
    options: EvalSetSection
    prompts: Sequence[Prompt]
    collector: Collector
    votes: Votes | None = None  # where the verifiers tell answers apart


@dataclass(frozen=True, slots=True)
class RolloutParts:
    """What makes scored rollouts of prompts: the engine's collectors, verifiers, the exchange between ranks."""

    collector: Collector
    evaluation: Sequence[EvaluationSet]
    score_groups: Callable[[list[RolloutGroup]], list[ScoredGroup]]
    gather: Callable[[list[ScoredGroup]], tuple[Experience, dict[str, int]]]
    weight_sync: WeightSync


@dataclass(frozen=True, slots=True)
class TrainedBatch:
    """A batch as it was trained on, with what was known of its tokens before."""

    experience: Experience
    scores: PolicyScores
    advantage_B: Float64Array
    difficulty_P: Float64Array  # before normalisation
    entropy_weight_B: Float64Array


class Samples(Protocol):
    """Keeps some of what the policy wrote, on the rank that generated it."""

    def generated(self, scored: Sequence[ScoredGroup]) -> None: ...
    def trained(self, step: int, batch: TrainedBatch) -> None: ...
    def evaluated(self, step: int, name: str, scored: Sequence[ScoredGroup]) -> None: ...
    def flush(self) -> None: ...


class NoSamples:
    """Keeps nothing."""

    def generated(self, scored: Sequence[ScoredGroup]) -> None:
        """Does nothing."""

    def trained(self, step: int, batch: TrainedBatch) -> None:
        """Does nothing."""

    def evaluated(self, step: int, name: str, scored: Sequence[ScoredGroup]) -> None:
        """Does nothing."""

    def flush(self) -> None:
        """Does nothing."""


class Throughput(Protocol):
    """The ``perf/*`` metrics of a step; every rank calls it, for the largest of what each has."""

    def __call__(
        self, times: Mapping[str, float], experience: Experience, *, num_generated: int
    ) -> dict[str, float]: ...


@dataclass(frozen=True, slots=True)
class Parts:
    """What compose/ chose for this run."""

    prompts: PromptSource
    rollouts: RolloutParts
    policy: Policy
    ledger: DifficultyLedger
    saves: Saves
    flight: FlightRecorder | None  # on one rank, where the run has a recorder
    reporter: StepReporter
    timer: PhaseTimer
    samples: Samples = field(default_factory=NoSamples)
    export: Callable[[int], None] = lambda step: None  # writes the policy after so many steps where one is due
    throughput: Throughput = lambda times, experience, *, num_generated: {}
    stop_requested: Callable[[], bool] = lambda: False  # asked between steps, by all ranks together; same on each

"""Controller, difficulty and coefficient do not know the layout: the real loop and the real actor on fixed rollouts.

Every layout of ranks and micro-batches runs ``train`` on the same rollouts, optimizer steps included. All ranks
must agree bitwise, all layouts within ``TOLERANCE``; a mean of micro-batch means must not pass for (sum, count).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest

from aer_megatron._C import DifficultyLedger
from aer_megatron.actor.batching import micro_batch_indices
from aer_megatron.algo.controller import ControllerState, Observation, initial_state
from aer_megatron.config import Config
from aer_megatron.loop.parts import Parts, Progress, RolloutParts
from aer_megatron.loop.phases import Assessment, Phases
from aer_megatron.loop.synchronous import train
from aer_megatron.parallel.platform import install_platform
from aer_megatron.report.reporter import NullReporter
from aer_megatron.report.timer import PhaseTimer
from aer_megatron.types import Experience, Float64Array, PolicyScores, Prompt
from tests.support.diary_of_saves import Diary
from tests.support.experiences import random_mask, with_mask
from tests.support.policies import VOCAB_SIZE, build_actor, policy_config
from tests.support.spawn import run_distributed

NUM_STEPS, NUM_PROMPTS, GROUP_SIZE = 4, 6, 4
NUM_SEQUENCES = NUM_PROMPTS * GROUP_SIZE
TOLERANCE = 1e-6


class Layout(NamedTuple):
    tp: int = 1
    pp: int = 1
    micro_batch_size: int = NUM_SEQUENCES


WHOLE = [Layout(), Layout(micro_batch_size=5), Layout(micro_batch_size=2)]
# two ranks: the first two are data parallelism
SHARDED = [Layout(micro_batch_size=12), Layout(micro_batch_size=5), Layout(tp=2, micro_batch_size=5)]
SHARDED += [Layout(pp=2, micro_batch_size=3)]


@dataclass(frozen=True, slots=True)
class Step:
    """What one step left: the controller's state, d before and after normalisation, and the bonus of every sequence."""

    state: ControllerState
    difficulty_P: Float64Array
    allocation_P: Float64Array
    entropy_weight_B: Float64Array


def rollouts(step: int) -> Experience:
    """Returns the same ragged rollouts of the same prompts for every layout; lengths differ between prompts.

    In every second step a tool speaks inside of the responses.
    """
    rng = np.random.default_rng(100 + step)
    group_B = np.repeat(np.arange(NUM_PROMPTS), GROUP_SIZE)
    prompt_B = rng.integers(2, 6, NUM_SEQUENCES)
    response_B = 1 + rng.integers(0, 3, NUM_SEQUENCES) * (1 + group_B)
    experience = Experience(
        prompt_id_B=(group_B + 7).astype(np.uint64),
        group_index_B=group_B,
        prompt_length_B=prompt_B,
        response_length_B=response_B,
        token_ids_L=rng.integers(0, VOCAB_SIZE, int((prompt_B + response_B).sum())),
        rollout_logprob_T=np.zeros(int(response_B.sum()), dtype=np.float32),
        reward_B=(rng.random(NUM_SEQUENCES) < 0.15 * group_B).astype(np.float64),
        truncated_B=np.zeros(NUM_SEQUENCES, dtype=np.bool_),
        policy_version_B=np.zeros(NUM_SEQUENCES, dtype=np.int64),
        policy_version_sum_B=np.zeros(NUM_SEQUENCES, dtype=np.int64),
    )
    if step % 2 == 0:
        return experience
    return with_mask(experience, random_mask(experience, step))


def run_config(layout: Layout) -> Config:
    return policy_config(
        parallel=layout._asdict(),
        run={"num_steps": NUM_STEPS, "checkpoint_every": 1},
        rollout={"prompts_per_step": NUM_PROMPTS, "group_size": GROUP_SIZE, "max_new_tokens": 20},
        optimizer={"lr": 1e-3},
        algo={
            "num_minibatches": 1,
            "entropy": {
                "update": "pi",
                "source": "ledger",
                "normalize": "mean",
                "tau": 1.1,
                "eta": 0.1,
                "k_p": 0.5,
                "alpha_max": 1.0,
                "mismatch_bound": 0.0,  # no engine sampled these
            },
        },
    )


class WatchedPhases(Phases):
    """The phases, with every assessment kept."""

    def __init__(self, config: Config, parts: Parts, start: Progress) -> None:
        super().__init__(config, parts, start)
        self.assessed: list[Assessment] = []

    def assess(self, experience: Experience, scores: PolicyScores, step: int, policy_version: int) -> Assessment:
        self.assessed.append(super().assess(experience, scores, step, policy_version))
        return self.assessed[-1]


class MeanOfMeansPhases(WatchedPhases):
    """The mutant: H is the mean over ranks and micro-batches of each micro-batch's own token mean."""

    def assess(self, experience: Experience, scores: PolicyScores, step: int, policy_version: int) -> Assessment:
        assessed = super().assess(experience, scores, step, policy_version)
        lengths_B = experience.prompt_length_B + experience.response_length_B
        parts_T = np.split(scores.token_entropy_T.astype(np.float64), np.cumsum(experience.sampled_length_B)[:-1])
        dp = self.parts.policy.topology.dp  # type: ignore[attr-defined]
        means = [
            np.concatenate([parts_T[index] for index in micro]).mean()
            for dp_rank in range(dp)
            for micro in micro_batch_indices(
                np.arange(experience.num_sequences),
                lengths_B,
                dp_rank=dp_rank,
                dp_size=dp,
                micro_batch_size=self.config.parallel.micro_batch_size,
            )
        ]
        observation = Observation(float(np.mean(means)), 1.0, assessed.observation.difficulty_mean)
        return dataclasses.replace(assessed, observation=observation)


class FixedRollouts:
    """Prompts, engine and verifiers in one: step ``k`` answers ``rollouts(k)``."""

    def next_prompts(self, count: int) -> list[Any]:
        return [Prompt(0, "", (1,), "", "math")] * count

    def state_dict(self) -> dict[str, int]:
        return {}

    def collect(self, prompts: Any, *, step: int, refill: int, num_groups: int | None = None) -> list[Any]:
        return [step]

    def publish(self, named_tensors: Iterator[Any], version: int) -> None:
        for _ in named_tensors:
            pass


class WatchedPolicy:
    """The actor, with the bonus of every batch kept."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self.weights: list[Float64Array] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._actor, name)

    def train(self, batch: Any, **options: Any) -> Any:
        self.weights.append(batch.entropy_weight_B)
        return self._actor.train(batch, **options)


def run_layout(layout: Layout, phases_class: type[WatchedPhases]) -> list[Step]:
    """Returns what every step left on the calling rank."""
    config = run_config(layout)
    saved: list[Progress] = []
    fixed, policy = FixedRollouts(), WatchedPolicy(build_actor(config))
    parts: Any = Parts(
        prompts=fixed,
        rollouts=RolloutParts(
            collector=fixed,
            evaluation=(),
            score_groups=lambda groups: groups,
            gather=lambda groups: (rollouts(groups[0]), {}),
            weight_sync=fixed,
        ),
        policy=policy,
        ledger=DifficultyLedger(config.algo.ledger.decay, NUM_PROMPTS),
        saves=Diary(saved),
        flight=None,
        reporter=NullReporter(),
        timer=PhaseTimer(),
    )
    phases = phases_class(config, parts, Progress(0, 0, initial_state(config.algo.entropy), {}))
    train(phases)
    return [
        Step(progress.controller_state, assessed.difficulty_P, assessed.allocation_P, weight_B)
        for progress, assessed, weight_B in zip(saved, phases.assessed, policy.weights, strict=True)
    ]


def _layouts(rank: int, world_size: int, layouts: list[Layout]) -> dict[str, list[list[Step]]]:
    install_platform()
    return {
        "true": [run_layout(layout, WatchedPhases) for layout in layouts],
        "mutant": [run_layout(layout, MeanOfMeansPhases) for layout in layouts if layout.tp == layout.pp == 1],
    }


@pytest.fixture(scope="module")
def whole() -> dict[str, list[list[Step]]]:
    return run_distributed(_layouts, 1, WHOLE, timeout_s=200)[0]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def sharded() -> list[dict[str, list[list[Step]]]]:
    return run_distributed(_layouts, 2, SHARDED, timeout_s=300)


def distance(one: list[Step], other: list[Step]) -> float:
    """Returns the largest difference in any number of any step."""
    largest = 0.0
    for mine, theirs in zip(one, other, strict=True):
        for name in ("alpha", "integral", "initial_entropy"):
            largest = max(largest, abs(getattr(mine.state, name) - getattr(theirs.state, name)))
        for name in ("difficulty_P", "allocation_P", "entropy_weight_B"):
            largest = max(largest, float(np.abs(getattr(mine, name) - getattr(theirs, name)).max()))
    return largest


def test_the_run_exercises_the_controller(whole: dict[str, list[list[Step]]]) -> None:
    steps = whole["true"][0]
    alphas = [step.state.alpha for step in steps]
    assert len(steps) == NUM_STEPS
    assert len(set(alphas)) == NUM_STEPS and min(alphas) > 1e-3
    assert all(len(set(step.difficulty_P.tolist())) >= 3 for step in steps)
    lengths = rollouts(0).response_length_B
    assert lengths.max() > 5 * lengths.min()  # equal lengths would make a mean of means right


@pytest.mark.parametrize("index", range(len(SHARDED)), ids=[str(tuple(layout)) for layout in SHARDED])
def test_ranks_agree_bitwise(index: int, sharded: list[dict[str, list[list[Step]]]]) -> None:
    for mine, theirs in zip(sharded[0]["true"][index], sharded[1]["true"][index], strict=True):
        assert mine.state == theirs.state
        for name in ("difficulty_P", "allocation_P", "entropy_weight_B"):
            assert getattr(mine, name).tobytes() == getattr(theirs, name).tobytes()


@pytest.mark.parametrize("index", range(1, len(WHOLE)), ids=[str(tuple(layout)) for layout in WHOLE[1:]])
def test_micro_batch_sizes_agree(index: int, whole: dict[str, list[list[Step]]]) -> None:
    assert distance(whole["true"][index], whole["true"][0]) < TOLERANCE


@pytest.mark.parametrize("index", range(len(SHARDED)), ids=[str(tuple(layout)) for layout in SHARDED])
def test_layouts_agree(
    index: int, whole: dict[str, list[list[Step]]], sharded: list[dict[str, list[list[Step]]]]
) -> None:
    assert distance(sharded[0]["true"][index], whole["true"][0]) < TOLERANCE


def test_a_mean_of_means_would_not_pass(
    whole: dict[str, list[list[Step]]], sharded: list[dict[str, list[list[Step]]]]
) -> None:
    # in one micro-batch on one rank there is one mean, and the mutant is right
    assert distance(whole["mutant"][0], whole["true"][0]) < TOLERANCE
    for mutant in [*whole["mutant"][1:], *sharded[0]["mutant"]]:
        assert distance(mutant, whole["mutant"][0]) > 100 * TOLERANCE

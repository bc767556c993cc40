"""The asynchronous loop on parts without a model: order of events, bound of staleness, what a checkpoint holds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from aer_megatron._C import DifficultyLedger
from aer_megatron.algo.controller import initial_state
from aer_megatron.algo.experience import pack_groups
from aer_megatron.config import Config
from aer_megatron.loop.asynchronous import train_ahead
from aer_megatron.loop.parts import EvaluationSet, Parts, Progress, RolloutParts
from aer_megatron.loop.phases import Phases
from aer_megatron.loop.synchronous import train
from aer_megatron.report.timer import PhaseTimer
from aer_megatron.types import (
    Completion,
    PolicyScores,
    Prompt,
    RolloutGroup,
    ScoredGroup,
    StepStats,
    Verdict,
    VersionSpan,
)
from tests.support.diary_of_saves import Diary

NUM_STEPS, NUM_PROMPTS, GROUP_SIZE = 6, 3, 2
TIMEOUT_S = 20.0


def run_config(staleness: int, **rollout: Any) -> Config:
    return Config.from_table(
        {
            "run": {"num_steps": NUM_STEPS, "checkpoint_every": 1},
            "model": {"path": "unused"},
            "data": {"train": {"task": "countdown", "options": {"split": "train"}}},
            "rollout": {
                "engine": "sglang",
                "prompts_per_step": NUM_PROMPTS,
                "group_size": GROUP_SIZE,
                "staleness": staleness,
                **rollout,
            },
            "sglang": {"urls": ["http://unused"]},
        }
    )


class World:
    """Prompts, servers, verifiers and policy in one, with a diary of events."""

    def __init__(self) -> None:
        self.next_id = 0
        self.version = -1
        self.diary: list[tuple[str, int]] = []
        self.trained: list[list[int]] = []  # prompt ids of every step
        self.begun = {step: threading.Event() for step in range(NUM_STEPS + 1)}
        self.wait_for: Callable[[int], int | None] = lambda step: None  # generation that a training waits for
        self.fails_at: int | None = None
        self.evaluation_fails_at: int | None = None
        self.evaluating = {step: threading.Event() for step in range(NUM_STEPS + 1)}
        self.training: dict[int, threading.Event] = {}
        self.lines: list[dict[str, Any]] = []
        self.stops_behind: int | None = None

    # the user
    def stop_requested(self) -> bool:
        return len(self.trained) - 1 == self.stops_behind

    # prompts
    def next_prompts(self, count: int) -> list[Prompt]:
        self.next_id += count
        return self.prompts_of(range(self.next_id - count, self.next_id))

    def prompts_of(self, ids: Sequence[int]) -> list[Prompt]:
        return [Prompt(number, "", (1, 2), "", "math") for number in ids]

    def state_dict(self) -> dict[str, int]:
        return {"next_id": self.next_id}

    # servers
    def collect(self, prompts: list[Prompt], *, step: int, refill: int, num_groups: int) -> list[RolloutGroup]:
        self.diary.append(("generate", step))
        self.begun[step].set()
        if step == self.fails_at:
            raise RuntimeError("no rollout server came into service")
        spans = (VersionSpan(self.version, 0, 3),)
        return [
            RolloutGroup(prompt, (Completion((3, 4, 5), (-0.5,) * 3, "stop", spans),) * GROUP_SIZE)
            for prompt in prompts[:num_groups]
        ]

    def publish(self, named_tensors: Iterator[Any], version: int) -> None:
        self.version = version
        self.diary.append(("publish", version))

    # verifiers: one of three prompts has an advantage
    def score_groups(self, groups: list[RolloutGroup]) -> list[ScoredGroup]:
        return [
            ScoredGroup(group, (Verdict(1.0, "right"), Verdict(float(group.prompt.id % 3 > 0), "any")))
            for group in groups
        ]

    # policy
    def score(self, experience: Any, *, seed: int) -> PolicyScores:
        values_T = np.full(experience.num_sampled_tokens, 0.5, dtype=np.float32)
        return PolicyScores(-values_T, values_T)

    def train(self, batch: Any, *, seed: int, entropy_gradient: bool) -> StepStats:
        step = len(self.trained)
        self.diary.append(("train", step))
        self.trained.append(batch.experience.prompt_id_B[::GROUP_SIZE].tolist())
        if step in self.training:
            self.training[step].set()
        awaited = self.wait_for(step)
        if awaited is not None:
            assert self.begun[awaited].wait(TIMEOUT_S), f"batch {awaited} is not generated while {step} trains"
        self.diary.append(("trained", step))
        names = ("policy_loss", "entropy_bonus", "clip_low", "clip_high", "approx_kl")
        return StepStats(dict.fromkeys(names, (0.0, 1.0)), 1.0, 1e-3)

    def hf_weights(self) -> Iterator[Any]:
        return iter(())

    # reporter
    def step(self, metrics: dict[str, Any]) -> None:
        self.lines.append(metrics)


class Answers:
    """The collector of an evaluation set: its problems have ids that training has not."""

    def __init__(self, world: World) -> None:
        self.world = world

    def collect(self, prompts: Sequence[Prompt], *, step: int, refill: int) -> list[RolloutGroup]:
        self.world.evaluating[step].set()
        if step == self.world.evaluation_fails_at:
            raise RuntimeError("no rollout server came into service")
        if step in self.world.training:  # what this evaluation must not end before
            assert self.world.training[step].wait(TIMEOUT_S), f"step {step} does not train while it is evaluated"
        self.world.diary.append(("evaluate", self.world.version))
        spans = (VersionSpan(self.world.version, 0, 3),)
        return [RolloutGroup(prompt, (Completion((3, 4, 5), (-0.5,) * 3, "stop", spans),) * 2) for prompt in prompts]


def run(world: World, config: Config, start: Progress | None = None) -> list[Progress]:
    """Returns what was saved after every step."""
    saved: list[Progress] = []
    anything: Any = world
    problems = [Prompt(101 + number, "", (1, 2), "", "countdown") for number in range(2)]
    evaluation = [EvaluationSet(name, each, problems, Answers(world)) for name, each in config.eval.sets.items()]
    parts = Parts(
        prompts=anything,
        rollouts=RolloutParts(
            collector=anything,
            evaluation=evaluation,
            score_groups=world.score_groups,
            gather=lambda groups: (pack_groups(groups), {}),
            weight_sync=world,
        ),
        policy=anything,
        ledger=DifficultyLedger(0.9, 16),
        saves=Diary(saved),
        flight=None,
        reporter=anything,
        timer=PhaseTimer(),
        stop_requested=world.stop_requested,
    )
    start = start or Progress(0, 0, initial_state(config.algo.entropy), {"next_id": 0})
    world.next_id = start.cursor["next_id"]
    world.trained = [[]] * start.next_step
    (train_ahead if config.rollout.staleness else train)(Phases(config, parts, start))
    return saved


@pytest.mark.parametrize("staleness", [1, 2])
def test_later_batches_are_generated_while_one_trains(staleness: int) -> None:
    world = World()
    # training does not end before the generation of the last batch that the bound allows has begun
    world.wait_for = lambda step: min(step + staleness, NUM_STEPS - 1)
    run(world, run_config(staleness))
    for step in range(NUM_STEPS - 1):
        assert world.diary.index(("generate", step + 1)) < world.diary.index(("trained", step))
    assert [what for what in world.diary if what[0] == "train"] == [("train", step) for step in range(NUM_STEPS)]


def test_without_staleness_generation_and_training_take_turns() -> None:
    world = World()
    run(world, run_config(0))
    expected = [(what, step) for step in range(NUM_STEPS) for what in ("generate", "train", "trained")]
    assert [event for event in world.diary if event[0] != "publish"] == expected


@pytest.mark.parametrize("staleness", [0, 1, 2, 4])
def test_staleness_is_measured_and_never_beyond_its_bound(staleness: int) -> None:
    """Generation takes no time here, so every batch is as stale as the bound lets it be."""
    world = World()
    world.wait_for = lambda step: min(step + staleness, NUM_STEPS - 1)
    run(world, run_config(staleness))
    measured = [line["rollout/staleness_max"] for line in world.lines]
    assert max(measured) <= staleness
    assert measured[-1] == staleness and measured[0] == 0
    assert [line["rollout/staleness_mean"] for line in world.lines] == measured  # every token of a batch alike


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("staleness", "resumed_with"), [(1, 1), (2, 2), (2, 0), (0, 2)])
def test_no_prompt_is_lost_or_trained_twice_over_a_resume(staleness: int, resumed_with: int, dynamic: bool) -> None:
    options = {"dynamic_sampling": dynamic, "max_refills": 1}
    straight = World()
    saved = run(straight, run_config(staleness, **options))
    for progress in saved:
        steps = [batch.step for batch in progress.pending]
        assert steps == list(range(progress.next_step, min(progress.next_step + staleness, NUM_STEPS)))
    stop = saved[2]
    resumed = World()
    run(resumed, run_config(resumed_with, **options), stop)
    drawn = straight.trained[:3] + resumed.trained[3:]
    ids = [number for step in drawn for number in step]
    assert len(ids) == NUM_STEPS * NUM_PROMPTS and len(set(ids)) == len(ids)
    if staleness == resumed_with:
        assert resumed.trained[3:] == straight.trained[3:]
    waiting = [number for batch in stop.pending for number in batch.prompt_ids]
    assert set(waiting) <= set(ids) or dynamic  # dynamic sampling may drop a group, never repeat one
    if not dynamic:
        assert sorted(ids) == list(range(len(ids)))


def test_a_generation_that_fails_ends_the_run() -> None:
    world = World()
    world.fails_at = 2
    with pytest.raises(RuntimeError, match="no rollout server"):
        run(world, run_config(1))
    assert ("train", 1) in world.diary and ("train", 2) not in world.diary


def test_over_sampling_launches_more_and_counts_what_it_gives_up() -> None:
    world = World()
    run(world, run_config(1, oversample=1.5))
    assert all(line["rollout/groups_aborted"] == 2 for line in world.lines)  # ceil(3 * 1.5) - 3
    assert world.trained == [[5 * step, 5 * step + 1, 5 * step + 2] for step in range(NUM_STEPS)]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"rollout": {"staleness": 1}}, "rollout.staleness=1 needs rollout.engine='sglang'"),
        ({"rollout": {"oversample": 1.5}}, "rollout.oversample=1.5 needs rollout.engine='sglang'"),
        ({"eval": {"overlap": True}}, "eval.overlap=true needs rollout.engine='sglang'"),
        (
            {
                "eval": {"overlap": True},
                "rollout": {"engine": "sglang"},
                "sglang": {"urls": ["http://a"], "release_memory": True},
            },
            "eval.overlap=true has servers answer .* sglang.release_memory=true",
        ),
    ],
)
def test_what_the_configuration_refuses(table: dict[str, Any], message: str) -> None:
    base = {"model": {"path": "unused"}, "data": {"train": {"task": "countdown", "options": {"split": "train"}}}}
    with pytest.raises(ValueError, match=message):
        Config.from_table(base | table)


@pytest.mark.parametrize("staleness", [0, 1, 2])
@pytest.mark.parametrize("every", [0, 1, 2])
def test_a_run_that_is_asked_to_stop_is_saved_once_and_goes_on_the_same(staleness: int, every: int) -> None:
    config = run_config(staleness)
    config = config.with_options({"run.checkpoint_every": every})
    straight, world = World(), World()
    run(straight, config)
    world.stops_behind = 2
    saved = run(world, config)
    assert [progress.next_step for progress in saved] == {0: [3], 1: [1, 2, 3], 2: [2, 3]}[every]
    assert len(world.trained) == 3
    resumed = World()
    run(resumed, config, saved[-1])
    assert world.trained + resumed.trained[3:] == straight.trained


# --- evaluation


def with_sets(staleness: int, *, overlap: bool, **every: int) -> Config:
    sets = {
        name: {"source": {"task": "countdown"}, "num_samples": 2, "k": [1, 2], "every": steps}
        for name, steps in every.items()
    }
    return run_config(staleness).with_options({"eval.sets": sets, "eval.overlap": overlap})


@pytest.mark.parametrize("staleness", [0, 2])
@pytest.mark.parametrize("overlap", [False, True])
def test_sets_are_evaluated_when_they_are_due_and_at_the_end_and_change_no_number(
    staleness: int, overlap: bool
) -> None:
    plain, world = World(), World()
    for each in (plain, world):
        each.wait_for = lambda step: min(step + staleness, NUM_STEPS - 1)  # as stale as the bound lets it be
    run(plain, run_config(staleness))
    run(world, with_sets(staleness, overlap=overlap, often=2, rarely=5, never=0))
    measured = {
        name: [line["step"] for line in world.lines if f"eval/{name}/pass@1" in line]
        for name in ("often", "rarely", "never")
    }
    assert measured == {"often": [0, 2, 4, 6], "rarely": [0, 5, 6], "never": []}
    assert [version for what, version in world.diary if what == "evaluate"] == [0, 0, 2, 4, 5, 6, 6]
    last = world.lines.pop()
    assert all(name == "step" or name.startswith(("eval/", "time/")) for name in last)
    assert (last["eval/often/pass@1"], last["eval/often/pass@2"], last["eval/often/avg@2"]) == (0.75, 1.0, 0.75)
    assert 0 < last["eval/often/pass@1_low"] < 0.75 < last["eval/often/pass@1_high"] <= 1
    assert (last["eval/often/response_length_mean"], last["eval/often/truncated"]) == (3.0, 0.0)

    def trained(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{k: v for k, v in line.items() if not k.startswith(("eval/", "time/"))} for line in lines]

    assert trained(world.lines) == trained(plain.lines)


@pytest.mark.parametrize("staleness", [0, 2])
def test_an_evaluation_beside_training_is_of_the_policy_before_it(staleness: int) -> None:
    world = World()
    world.training = {step: threading.Event() for step in range(NUM_STEPS)}  # it ends after the training has begun
    run(world, with_sets(staleness, overlap=True, often=1))
    for step in range(NUM_STEPS):
        begun, done = world.diary.index(("train", step)), world.diary.index(("evaluate", step))
        assert begun < done < world.diary.index(("publish", step + 1))
    assert [line["step"] for line in world.lines] == list(range(NUM_STEPS + 1))
    assert all("eval/often/pass@2" in line for line in world.lines)


@pytest.mark.parametrize("overlap", [False, True])
def test_an_evaluation_that_fails_ends_the_run(overlap: bool) -> None:
    world = World()
    world.evaluation_fails_at = 2
    with pytest.raises(RuntimeError, match="no rollout server"):
        run(world, with_sets(0, overlap=overlap, often=1))
    assert ("publish", 2) in world.diary and ("publish", 3) not in world.diary


def test_a_run_that_is_stopped_is_not_at_its_end() -> None:
    world = World()
    world.stops_behind = 2
    run(world, with_sets(0, overlap=False, rarely=5))
    assert [line["step"] for line in world.lines if "eval/rarely/pass@1" in line] == [0]


def test_a_run_that_was_trained_and_not_evaluated_is_evaluated_alone() -> None:
    straight, resumed = World(), World()
    config = with_sets(0, overlap=False, rarely=5)
    saved = run(straight, config)
    run(resumed, config, saved[-1])
    [line] = resumed.lines
    assert {k: v for k, v in line.items() if not k.startswith("time/")} == {
        k: v for k, v in straight.lines[-1].items() if not k.startswith("time/")
    }

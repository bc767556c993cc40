"""The collector with a recording engine: shares, seeds, order; no model needed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aer_megatron.rollout.collect import RolloutCollector, share
from aer_megatron.rollout.engine import GenerateRequest, SamplingOptions
from aer_megatron.rollout.seeds import stream_seed
from aer_megatron.types import Completion, Prompt, RolloutGroup, VersionSpan

OPTIONS = SamplingOptions(1.0, 1.0, 0, frozenset())


class EchoEngine:
    """Answers each request with its prompt followed by the halves of its seed."""

    policy_version = 0

    def __init__(self) -> None:
        self.requests: list[GenerateRequest] = []

    def generate(self, requests: Sequence[GenerateRequest], options: SamplingOptions) -> list[Completion]:
        assert options is OPTIONS
        self.requests += requests
        answers = [(*r.prompt_ids, r.seed >> 32, r.seed & 0xFFFFFFFF) for r in requests]
        return [Completion(ids, (0.0,) * len(ids), "stop", (VersionSpan(0, 0, len(ids)),)) for ids in answers]


def make_prompts(*ids: int) -> list[Prompt]:
    return [Prompt(i, f"p{i}", (i, i + 1), "0", "math") for i in ids]


def run(
    prompts: list[Prompt],
    *,
    world_size: int = 1,
    step: int = 0,
    refill: int = 0,
    stream: str = "train",
    num_samples: int = 3,
) -> list[RolloutGroup]:
    groups = []
    for rank in range(world_size):
        collector = RolloutCollector(
            EchoEngine(),
            OPTIONS,
            num_samples=num_samples,
            max_new_tokens=8,
            stream_seed=stream_seed(1, stream),
            rank=rank,
            world_size=world_size,
        )
        groups += collector.collect(prompts, step=step, refill=refill)
    return groups


def seeds_of(groups: list[RolloutGroup]) -> list[tuple[int, ...]]:
    return [completion.token_ids[2:] for group in groups for completion in group.completions]


@pytest.mark.parametrize(
    ("num_items", "world_size", "expected"),
    [
        (5, 2, [(0, 3), (3, 5)]),
        (8, 4, [(0, 2), (2, 4), (4, 6), (6, 8)]),
        (2, 3, [(0, 1), (1, 2), (2, 2)]),
        (0, 2, [(0, 0), (0, 0)]),
    ],
)
def test_share(num_items: int, world_size: int, expected: list[tuple[int, int]]) -> None:
    parts = [share(num_items, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert [(part.start, part.stop) for part in parts] == expected


@pytest.mark.parametrize("rank", [-1, 2])
def test_share_refuses_a_rank_outside_the_world(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"rank={rank} must lie in 0..1"):
        share(4, rank=rank, world_size=2)


def test_groups_come_in_prompt_order_with_their_own_completions() -> None:
    prompts = make_prompts(40, 10, 30)
    groups = run(prompts)
    assert [group.prompt for group in groups] == prompts
    for group in groups:
        assert len(group.completions) == 3
        assert {completion.token_ids[:2] for completion in group.completions} == {group.prompt.token_ids}
    assert len(set(seeds_of(groups))) == 9


@pytest.mark.parametrize("world_size", [2, 3, 4, 7])
def test_the_union_over_ranks_does_not_depend_on_their_number(world_size: int) -> None:
    prompts = make_prompts(1, 2, 3, 2, 2)
    assert run(prompts, world_size=world_size) == run(prompts)


def test_a_prompt_drawn_twice_is_answered_afresh() -> None:
    seeds = seeds_of(run(make_prompts(5, 6, 5)))
    assert len(set(seeds)) == 9


def test_seeds_follow_the_prompt_and_not_its_place_in_the_batch() -> None:
    forward, backward = run(make_prompts(1, 2, 3)), run(make_prompts(3, 2, 1))
    assert forward == backward[::-1]


def test_steps_refills_and_streams_have_their_own_seeds() -> None:
    prompts = make_prompts(1, 2)
    runs = [run(prompts), run(prompts, step=1), run(prompts, refill=1), run(prompts, stream="eval")]
    seeds = [seed for groups in runs for seed in seeds_of(groups)]
    assert len(set(seeds)) == len(seeds) == 24


def test_more_samples_extend_the_same_rollouts() -> None:
    three, five = run(make_prompts(1)), run(make_prompts(1), num_samples=5)
    assert five[0].completions[:3] == three[0].completions


def test_num_samples_must_be_positive() -> None:
    with pytest.raises(ValueError, match="num_samples=0"):
        run(make_prompts(1), num_samples=0)


class RacingEcho(EchoEngine):
    """Groups with an odd first prompt token are slow."""

    def generate_first(
        self, groups: Sequence[Sequence[GenerateRequest]], options: SamplingOptions, *, wanted: int
    ) -> dict[int, list[Completion]]:
        order = sorted(range(len(groups)), key=lambda index: groups[index][0].prompt_ids[0] % 2)
        return {index: self.generate(groups[index], options) for index in order[:wanted]}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_rank_keeps_its_share_of_the_first_groups(world_size: int) -> None:
    prompts = make_prompts(*range(8))
    groups = []
    for rank in range(world_size):
        collector = RolloutCollector(
            RacingEcho(),
            OPTIONS,
            num_samples=2,
            max_new_tokens=8,
            stream_seed=stream_seed(1, "train"),
            rank=rank,
            world_size=world_size,
        )
        mine = collector.collect(prompts, step=0, refill=0, num_groups=5)
        expected = share(5, rank=rank, world_size=world_size)
        assert len(mine) == expected.stop - expected.start
        assert all(len(group.completions) == 2 for group in mine)
        groups += mine
    ids = [group.prompt.id for group in groups]
    assert len(ids) == 5 and ids == sorted(set(ids))  # in prompt order
    plain = {group.prompt.id: group for group in run(prompts, num_samples=2)}
    assert all(plain[group.prompt.id] == group for group in groups)  # the seeds are those without a race
    with pytest.raises(ValueError, match="num_groups=9 must not exceed the 8 prompts"):
        collector.collect(prompts, step=0, refill=0, num_groups=9)


@given(num_items=st.integers(0, 500), world_size=st.integers(1, 70))
def test_shares_partition_the_items_evenly(num_items: int, world_size: int) -> None:
    parts = [range(num_items)[share(num_items, rank=rank, world_size=world_size)] for rank in range(world_size)]
    assert [item for part in parts for item in part] == list(range(num_items))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1

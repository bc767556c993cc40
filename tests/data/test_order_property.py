from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from aer_megatron.data import countdown
from aer_megatron.data.prompts import PromptCursor, PromptSet, epoch_order
from aer_megatron.data.records import Record
from aer_megatron.data.tokenizer import load_tokenizer
from aer_megatron.options.data import DataSection, SourceSection
from aer_megatron.rewards.countdown import verify_countdown
from aer_megatron.types import Prompt

TOKENIZER = load_tokenizer(Path(__file__).parents[2] / "examples" / "quickstart" / "model")
DATA = DataSection(train=SourceSection(task="countdown"), template="plain")


def make_cursor(size: int, seed: int) -> PromptCursor:
    records = [Record(index, str(index), "1", "math", None) for index in range(size)]
    return PromptCursor(PromptSet(records, TOKENIZER, DATA), seed)


@given(seed=st.integers(0, 2**40), epoch=st.integers(0, 10**6), size=st.integers(1, 200))
def test_an_epoch_is_a_permutation(seed: int, epoch: int, size: int) -> None:
    order = epoch_order(seed, epoch, size)
    assert sorted(order.tolist()) == list(range(size))
    assert np.array_equal(order, epoch_order(seed, epoch, size))


@given(
    size=st.integers(1, 30),
    seed=st.integers(0, 1000),
    before=st.lists(st.integers(0, 40), max_size=5),
    after=st.lists(st.integers(0, 40), min_size=1, max_size=5),
)
@settings(deadline=None)
def test_a_resumed_cursor_continues_as_if_never_stopped(
    size: int, seed: int, before: list[int], after: list[int]
) -> None:
    straight, stopped, resumed = (make_cursor(size, seed) for _ in range(3))
    for count in before:
        straight.next_prompts(count)
        stopped.next_prompts(count)
    resumed.load_state_dict(stopped.state_dict())
    for count in after:
        assert resumed.next_prompts(count) == straight.next_prompts(count)
    assert resumed.state_dict() == straight.state_dict()


@given(
    size=st.integers(1, 30),
    seed=st.integers(0, 1000),
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=6),
)
@settings(deadline=None)
def test_every_epoch_hands_out_every_prompt_once(size: int, seed: int, counts: list[int]) -> None:
    cursor = make_cursor(size, seed)
    ids = [prompt.id for count in counts for prompt in cursor.next_prompts(count)]
    assert len(ids) == sum(counts)
    for start in range(0, len(ids) - size + 1, size):
        assert sorted(ids[start : start + size]) == list(range(size))


@given(seed=st.integers(0, 2**32), split=st.sampled_from(["train", "eval"]))
@settings(max_examples=15, deadline=None)
def test_sampled_solutions_verify(seed: int, split: str) -> None:
    items = countdown.generate(size=64, seed=seed, options={"split": split})
    problems, answers = items.texts()
    draws = countdown.random_solutions(items, np.arange(64), np.random.default_rng(seed))
    for problem, answer, row in zip(problems, answers, draws.tolist(), strict=True):
        prompt = Prompt(1, problem, (1,), answer, "countdown")
        assert verify_countdown(bytes(row).decode(), prompt).reason == "correct"

"""PromptCursor.select_prompts: what is passed over, that the search ends, and that a resumed cursor agrees."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from aer_megatron._C import DifficultyLedger
from aer_megatron.algo.options import LedgerSection, SelectionSection
from aer_megatron.algo.selection import skip_decided
from aer_megatron.data.prompts import PromptCursor, PromptSet
from aer_megatron.data.records import Record
from aer_megatron.data.tokenizer import load_tokenizer
from aer_megatron.options.data import DataSection, SourceSection

DATA = DataSection(train=SourceSection(task="countdown"), template="plain")


@pytest.fixture(scope="module")
def prompts() -> PromptSet:
    tokenizer = load_tokenizer(Path(__file__).parents[2] / "examples" / "quickstart" / "model")
    return PromptSet([Record(i, str(i), "1", "math", None) for i in range(20)], tokenizer, DATA)


def even(ids: np.ndarray) -> np.ndarray:
    return ids % 2 == 0


def test_accepted_prompts_come_in_the_cursors_order(prompts: PromptSet) -> None:
    plain, selecting = PromptCursor(prompts, 5), PromptCursor(prompts, 5)
    order = [prompt.id for prompt in plain.next_prompts(20)]
    wanted = [i for i in order if i % 2 == 0]
    taken, passed_over = selecting.select_prompts(6, accept=even, max_rejected=100)
    assert [prompt.id for prompt in taken] == wanted[:6]
    assert passed_over == sum(i % 2 for i in order[: order.index(wanted[5]) + 1])
    # nothing is lost: the search stops at the last prompt that it took
    rest, _ = selecting.select_prompts(4, accept=even, max_rejected=100)
    assert [prompt.id for prompt in rest] == wanted[6:]


def test_accepting_everything_is_next_prompts(prompts: PromptSet) -> None:
    plain, selecting = PromptCursor(prompts, 5), PromptCursor(prompts, 5)
    for count in (3, 20, 7):
        chosen, passed_over = selecting.select_prompts(count, accept=lambda ids: ids >= 0, max_rejected=8)
        assert (chosen, passed_over) == (plain.next_prompts(count), 0)
    assert selecting.state_dict() == plain.state_dict()


@pytest.mark.parametrize("max_rejected", [0, 1, 7, 50])
def test_a_set_without_a_wanted_prompt_ends_the_search(prompts: PromptSet, max_rejected: int) -> None:
    cursor, plain = PromptCursor(prompts, 5), PromptCursor(prompts, 5)
    taken, passed_over = cursor.select_prompts(4, accept=lambda ids: ids < 0, max_rejected=max_rejected)
    assert passed_over == max_rejected
    assert taken == plain.next_prompts(max_rejected + 4)[max_rejected:]
    assert cursor.state_dict() == plain.state_dict()


def test_a_resumed_cursor_selects_the_same(prompts: PromptSet) -> None:
    straight, resumed = PromptCursor(prompts, 9), PromptCursor(prompts, 9)
    straight.select_prompts(7, accept=even, max_rejected=5)
    resumed.load_state_dict(straight.state_dict())
    for _ in range(4):
        expected = straight.select_prompts(5, accept=even, max_rejected=3)
        assert resumed.select_prompts(5, accept=even, max_rejected=3) == expected


def run_steps(
    cursor: PromptCursor, ledger: DifficultyLedger, steps: range, selection: SelectionSection
) -> list[tuple[list[int], int]]:
    """Plays the trainer's part: select by the ledger, "solve" every third prompt, record it."""
    history = []
    for step in steps:
        skip = partial(skip_decided, ledger, selection=selection, prior=LedgerSection(decay=0.99), seed=4, step=step)
        taken, passed_over = cursor.select_prompts(5, accept=lambda ids, skip=skip: ~skip(ids), max_rejected=10)
        ids = np.array([prompt.id for prompt in taken], dtype=np.uint64)
        attempts = np.full(len(ids), 8)
        ledger.update(ids, attempts, np.where(ids % 3 == 0, 8, 3), np.zeros(len(ids)), attempts, step=step)
        history.append((ids.tolist(), passed_over))
    return history


def test_cursor_and_ledger_of_a_checkpoint_continue_the_same_selection(prompts: PromptSet, tmp_path: Path) -> None:
    selection = SelectionSection(kind="skip_decided", min_attempts=8, margin=0.2, confidence=0.8, exploration=0.3)
    cursor, ledger = PromptCursor(prompts, 2), DifficultyLedger(0.99, 0)
    run_steps(cursor, ledger, range(9), selection)
    ledger.save(str(tmp_path / "ledger"))
    resumed = PromptCursor(prompts, 2)
    resumed.load_state_dict(cursor.state_dict())
    straight = run_steps(cursor, ledger, range(9, 30), selection)
    assert run_steps(resumed, DifficultyLedger.load(str(tmp_path / "ledger")), range(9, 30), selection) == straight
    assert sum(passed_over for _, passed_over in straight) > 20
    always = [prompt for ids, _ in straight for prompt in ids if prompt % 3 == 0]
    assert 0 < len(always) < 21 * 5 * 7 / 20  # explored, and rarer than their share of 7 prompts in 20


def test_prompts_of_a_checkpoint_come_back_without_moving_on(prompts: PromptSet) -> None:
    cursor = PromptCursor(prompts, 5)
    drawn = cursor.next_prompts(4)
    before = cursor.state_dict()
    assert cursor.prompts_of([prompt.id for prompt in reversed(drawn)]) == drawn[::-1]
    assert cursor.state_dict() == before
    with pytest.raises(ValueError, match=r"waits for prompt 0x63, which data\.train does not hold"):
        cursor.prompts_of([3, 99])

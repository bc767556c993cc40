"""Algebra of the ledger: splits, orders and merges do not matter, and a file is the ledger."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from aer_megatron._C import DifficultyLedger
from tests.support.ledger_reference import ReferenceLedger

# Few ids, some of them at the ends of the range: collisions of prompts are the interesting case.
PROMPT = st.sampled_from([0, 1, 2, 3, 2**32, 2**63, 2**64 - 1]) | st.integers(0, 40)
DECAY = st.sampled_from([1.0, 0.5, 0.9, 0.123, 1e-6])
EXACT_DECAY = st.sampled_from([1.0, 0.5])  # powers of these are exact on the ledger's grid
properties = settings(deadline=None, max_examples=60)


@dataclass(frozen=True)
class Entry:
    prompt: int
    attempts: int
    successes: int
    nats: float
    tokens: int


@st.composite
def entries(draw: st.DrawFn) -> Entry:
    attempts = draw(st.integers(0, 64))
    return Entry(
        draw(PROMPT),
        attempts,
        draw(st.integers(0, attempts)),
        draw(st.floats(0, 1e4, allow_subnormal=False)),
        draw(st.integers(0, 10**5)),
    )


BATCH = st.lists(entries(), max_size=30)
STEPS = st.lists(BATCH, max_size=5)


def add(ledger: DifficultyLedger | ReferenceLedger, batch: list[Entry], step: int) -> None:
    ledger.update(
        np.array([e.prompt for e in batch], dtype=np.uint64),
        np.array([e.attempts for e in batch], dtype=np.int64),
        np.array([e.successes for e in batch], dtype=np.int64),
        np.array([e.nats for e in batch], dtype=np.float64),
        np.array([e.tokens for e in batch], dtype=np.int64),
        step=step,
    )


def build(decay: float, steps: list[list[Entry]]) -> DifficultyLedger:
    ledger = DifficultyLedger(decay, 0)
    for step, batch in enumerate(steps):
        add(ledger, batch, step)
    return ledger


def merged(*ledgers: DifficultyLedger) -> DifficultyLedger:
    result = DifficultyLedger(ledgers[0].decay, 0)
    for ledger in ledgers:
        result.merge(ledger)
    return result


@properties
@given(DECAY, STEPS)
def test_matches_the_reference(decay: float, steps: list[list[Entry]]) -> None:
    ledger, reference = build(decay, steps), ReferenceLedger(decay)
    for step, batch in enumerate(steps):
        add(reference, batch, step)
    rows = ledger.export()
    assert rows.prompt_ids.tolist() == sorted(reference.visits)
    for i, prompt in enumerate(rows.prompt_ids.tolist()):
        row = reference.row(prompt)
        for name in ("attempts", "successes", "last_step", "token_count"):
            assert getattr(rows, name)[i] == row[name]
        for name in ("decayed_successes", "decayed_failures"):
            assert abs(getattr(rows, name)[i] - row[name]) <= len(steps) * 2.0**-32
        assert abs(rows.entropy_sum[i] - row["entropy_sum"]) <= len(reference.visits[prompt]) * 2.0**-31


@properties
@given(DECAY, STEPS, BATCH, st.randoms(use_true_random=False), st.integers(1, 4))
def test_order_and_split_of_a_batch_do_not_matter(decay, steps, batch, random, num_pieces) -> None:
    whole, pieces = build(decay, steps), build(decay, steps)
    add(whole, batch, step=9)
    shuffled = list(batch)
    random.shuffle(shuffled)
    for piece in range(num_pieces):
        add(pieces, shuffled[piece::num_pieces], step=9)
    assert whole == pieces


@properties
@given(DECAY, STEPS, STEPS)
def test_merge_is_commutative(decay: float, a: list[list[Entry]], b: list[list[Entry]]) -> None:
    one, two = build(decay, a), build(decay, b)
    assert merged(one, two) == merged(two, one)


@properties
@given(EXACT_DECAY, STEPS, STEPS, STEPS)
def test_merge_is_associative_to_the_bit_where_decay_is_exact(decay, a, b, c) -> None:
    one, two, three = build(decay, a), build(decay, b), build(decay, c)
    assert merged(merged(one, two), three) == merged(one, merged(two, three)) == merged(three, one, two)


@properties
@given(DECAY, BATCH, BATCH, BATCH)
def test_merge_within_a_step_is_associative_to_the_bit(decay, a, b, c) -> None:
    one, two, three = build(decay, [a]), build(decay, [b]), build(decay, [c])
    assert merged(merged(one, two), three) == merged(one, merged(three, two)) == build(decay, [a + b + c])


@properties
@given(DECAY, STEPS, STEPS, STEPS)
def test_merge_is_associative_up_to_the_rounding_of_decay(decay, a, b, c) -> None:
    one, two, three = build(decay, a), build(decay, b), build(decay, c)
    left = merged(merged(one, two), three).export().as_dict()
    right = merged(one, merged(two, three)).export().as_dict()
    for name, column in left.items():
        tolerance = 2.0**-30 if name.startswith("decayed") else 0.0
        np.testing.assert_allclose(column, right[name], rtol=0, atol=tolerance, err_msg=name)


@properties
@given(DECAY, STEPS)
def test_saving_and_loading_is_the_identity(decay: float, steps: list[list[Entry]]) -> None:
    ledger = build(decay, steps)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "ledger.bin")
        ledger.save(path)
        assert DifficultyLedger.load(path) == ledger


@properties
@given(DECAY, STEPS)
def test_merging_an_export_into_nothing_is_the_identity(decay: float, steps: list[list[Entry]]) -> None:
    ledger, copy = build(decay, steps), DifficultyLedger(decay, 0)
    copy.merge_state(ledger.export())
    assert copy == ledger


@properties
@given(DECAY, STEPS, st.floats(0.01, 10), st.floats(0.01, 10), st.integers(5, 4000))
def test_posterior_mean_is_a_probability_and_tends_to_the_prior(decay, steps, a, b, step) -> None:
    ledger = build(decay, steps)
    prompts = ledger.export().prompt_ids
    mean = ledger.posterior_mean(prompts, prior_success=a, prior_failure=b, step=step)
    assert ((mean > 0) & (mean < 1)).all()
    if decay < 0.95:
        late = ledger.posterior_mean(prompts, prior_success=a, prior_failure=b, step=100_000)
        np.testing.assert_allclose(late, a / (a + b), rtol=1e-12)

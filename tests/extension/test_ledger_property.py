"""Algebra of the ledger: splits and orders of a batch do not matter, and a file or a copy is the ledger."""

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
@given(DECAY, STEPS)
def test_saving_and_loading_and_copying_are_the_identity(decay: float, steps: list[list[Entry]]) -> None:
    ledger = build(decay, steps)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "ledger.bin")
        ledger.save(path)
        assert DifficultyLedger.load(path) == ledger
    assert ledger.copy() == ledger


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

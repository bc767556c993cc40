"""The difficulty ledger: hand-derived numbers, refusals that change nothing, queries against NumPy."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aer_megatron._C import DifficultyLedger
from tests.support.ledger_reference import ReferenceLedger

PRIOR = {"prior_success": 1.0, "prior_failure": 1.0}


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint64)


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def nats(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float64)


def add(ledger: DifficultyLedger, prompt: int, attempts: int, successes: int, step: int) -> None:
    ledger.update(ids(prompt), ints(attempts), ints(successes), nats(0.5 * attempts), ints(10 * attempts), step=step)


def random_ledger(seed: int, num_prompts: int, decay: float = 0.9) -> tuple[DifficultyLedger, ReferenceLedger]:
    rng = np.random.default_rng(seed)
    ledger, reference = DifficultyLedger(decay, 0), ReferenceLedger(decay)
    known = rng.integers(0, 2**64, num_prompts, dtype=np.uint64)
    for step in range(5):
        prompts = rng.choice(known, num_prompts)
        attempts = rng.integers(0, 17, num_prompts)
        successes = rng.integers(0, attempts + 1)
        entropy = rng.integers(0, 2**40, num_prompts) / 2.0**30  # on the ledger's grid: sums are exact
        tokens = rng.integers(0, 4000, num_prompts)
        for target in (ledger, reference):
            target.update(prompts, attempts, successes, entropy, tokens, step=step)
    return ledger, reference


def test_hand_derived_decay_and_posterior() -> None:
    ledger = DifficultyLedger(0.5, 0)
    add(ledger, 42, attempts=8, successes=6, step=3)
    add(ledger, 42, attempts=4, successes=1, step=5)
    row = ledger.lookup(ids(42)).as_dict()
    # 6 * 0.5^2 + 1 = 2.5 successes, 2 * 0.5^2 + 3 = 3.5 failures
    assert {name: column.tolist() for name, column in row.items()} == {
        "prompt_ids": [42],
        "decayed_successes": [2.5],
        "decayed_failures": [3.5],
        "attempts": [12],
        "successes": [7],
        "last_step": [5],
        "entropy_sum": [6.0],
        "token_count": [120],
    }
    at_5 = ledger.posterior_mean(ids(42), **PRIOR, step=5)
    at_6 = ledger.posterior_mean(ids(42), prior_success=2.0, prior_failure=1.0, step=6)
    assert at_5.tolist() == [3.5 / 8.0]
    assert at_6.tolist() == [(2.0 + 1.25) / (2.0 + 1.25 + 1.0 + 1.75)]


def test_unknown_prompts_have_zeros_and_the_prior_mean() -> None:
    ledger = DifficultyLedger(0.9, 100)
    rows = ledger.lookup(ids(5, 0))
    assert rows.prompt_ids.tolist() == [5, 0]
    assert rows.last_step.tolist() == [-1, -1]
    assert rows.attempts.tolist() == rows.successes.tolist() == rows.token_count.tolist() == [0, 0]
    mean = ledger.posterior_mean(ids(5), prior_success=1.0, prior_failure=3.0, step=9)
    assert mean.tolist() == [0.25]
    assert len(ledger) == 0


def test_matches_the_reference_over_many_prompts() -> None:
    ledger, reference = random_ledger(seed=1, num_prompts=3000)
    rows = ledger.export()
    assert rows.prompt_ids.tolist() == sorted(reference.visits)
    expected = [reference.row(prompt) for prompt in rows.prompt_ids.tolist()]
    for name, column in rows.as_dict().items():
        np.testing.assert_allclose(column, [row[name] for row in expected], rtol=0, atol=1e-8, err_msg=name)
    for name in ("attempts", "successes", "last_step", "entropy_sum", "token_count"):
        assert getattr(rows, name).tolist() == [row[name] for row in expected]
    means = ledger.posterior_mean(rows.prompt_ids, prior_success=0.5, prior_failure=2.0, step=7)
    wanted = [reference.posterior_mean(p, 0.5, 2.0, 7) for p in rows.prompt_ids.tolist()]
    np.testing.assert_allclose(means, wanted, rtol=0, atol=1e-9)


def test_long_decay_matches_the_power() -> None:
    ledger = DifficultyLedger(0.999, 0)
    add(ledger, 1, attempts=1000, successes=1000, step=0)
    for step in (255, 256, 300, 5000):
        mean = ledger.posterior_mean(ids(1), **PRIOR, step=step)[0]
        wins = 1000 * 0.999**step
        assert mean == pytest.approx((1 + wins) / (2 + wins), rel=1e-13)


def test_a_step_back_is_refused_and_named_and_changes_nothing() -> None:
    ledger = DifficultyLedger(0.9, 0)
    add(ledger, 7, attempts=8, successes=4, step=5)
    before = ledger.export().as_dict()
    with pytest.raises(ValueError, match=r"prompt 7 was last updated at step 5; step=4"):
        ledger.update(ids(1, 7), ints(1, 1), ints(0, 0), nats(0, 0), ints(1, 1), step=4)
    for name, column in ledger.export().as_dict().items():
        assert column.tolist() == before[name].tolist()
    with pytest.raises(ValueError, match=r"prompt 7 was last updated at step 5, after step=4"):
        ledger.posterior_mean(ids(7), **PRIOR, step=4)


@pytest.mark.parametrize(
    ("attempts", "successes", "entropy", "tokens", "step", "text"),
    [
        (1, 2, 0.0, 1, 0, r"prompt 9 \(index 1\): successes=2 must be in \[0, attempts=1\]"),
        (-1, 0, 0.0, 1, 0, "attempts=-1"),
        (2**32, 0, 0.0, 1, 0, "attempts=4294967296"),
        (1, -1, 0.0, 1, 0, "successes=-1"),
        (1, 0, -0.5, 1, 0, "entropy_sum=-0.5"),
        (1, 0, float("nan"), 1, 0, "entropy_sum=-?nan"),
        (1, 0, float("inf"), 1, 0, "entropy_sum=inf"),
        (1, 0, 0.0, -1, 0, "token_count=-1"),
        (1, 0, 0.0, 1, -1, "step=-1 must be in"),
        (1, 0, 0.0, 1, 2**31, "step=2147483648 must be in"),
    ],
)
def test_a_bad_entry_refuses_the_whole_batch(attempts, successes, entropy, tokens, step, text) -> None:
    ledger = DifficultyLedger(0.9, 0)
    with pytest.raises(ValueError, match=text):
        ledger.update(ids(3, 9), ints(1, attempts), ints(1, successes), nats(1, entropy), ints(1, tokens), step=step)
    assert len(ledger) == 0


def test_unequal_lengths_and_other_dtypes_are_refused() -> None:
    ledger = DifficultyLedger(0.9, 0)
    with pytest.raises(ValueError, match="one length"):
        ledger.update(ids(1, 2), ints(1), ints(1), nats(1), ints(1), step=0)
    with pytest.raises(TypeError, match=r"prompt_ids must be .* uint64 .* dtype int64"):
        ledger.lookup(ints(1))
    with pytest.raises(TypeError, match=r"attempts must be .* int64 .* dtype float64"):
        ledger.update(ids(1), nats(1), ints(1), nats(1), ints(1), step=0)


@pytest.mark.parametrize(("decay", "hint"), [(0.0, 0), (1.5, 0), (float("nan"), 0), (0.9, -1)])
def test_bad_constructor_arguments_are_refused(decay: float, hint: int) -> None:
    with pytest.raises(ValueError, match=r"decay=|capacity_hint="):
        DifficultyLedger(decay, hint)


def test_lifetime_limits_are_exact_and_refuse_before_any_change() -> None:
    ledger = DifficultyLedger(1.0, 0)
    most = 2**32 - 1
    ledger.update(ids(1), ints(most - 3), ints(0), nats(0), ints(most), step=0)
    with pytest.raises(ValueError, match="prompt 1: its lifetime attempts"):
        ledger.update(ids(2, 1, 1), ints(5, 2, 2), ints(0, 0, 0), nats(0, 0, 0), ints(0, 0, 0), step=0)
    assert len(ledger) == 1
    ledger.update(ids(2, 1, 1), ints(most, 2, 1), ints(0, 0, 0), nats(0, 0, 0), ints(0, 0, 0), step=0)
    assert ledger.lookup(ids(1, 2)).attempts.tolist() == [most, most]
    with pytest.raises(ValueError, match="prompt 2: its lifetime token_count"):
        ledger.update(ids(2, 2), ints(0, 0), ints(0, 0), nats(0, 0), ints(2**31, 2**31), step=0)
    with pytest.raises(ValueError, match="prompt 3: its lifetime entropy_sum"):
        ledger.update(ids(3, 3), ints(1, 1), ints(0, 0), nats(4e9, 1e9), ints(1, 1), step=0)
    assert len(ledger) == 2


def test_equality_sees_every_field_and_not_the_order_of_insertion() -> None:
    one, two = DifficultyLedger(0.9, 0), DifficultyLedger(0.9, 10_000)
    for prompt in (1, 2, 3):
        add(one, prompt, attempts=2, successes=1, step=0)
    for prompt in (3, 1, 2):
        add(two, prompt, attempts=2, successes=1, step=0)
    assert one == two
    add(two, 2, attempts=1, successes=0, step=0)
    assert one != two
    assert one != DifficultyLedger(0.9, 0)
    assert DifficultyLedger(0.9, 0) != DifficultyLedger(0.8, 0)
    assert one != "ledger"
    with pytest.raises(TypeError, match="unhashable"):
        hash(one)


def test_histogram_and_quantiles_match_numpy() -> None:
    ledger, _ = random_ledger(seed=4, num_prompts=500)
    rows = ledger.export()
    difficulty = 1.0 - ledger.posterior_mean(rows.prompt_ids, **PRIOR, step=6)
    used = rows.token_count > 0
    entropy = rows.entropy_sum[used] / rows.token_count[used]
    d_edges, e_edges = (
        np.linspace(0.2, 0.9, 6),
        np.append(np.quantile(entropy, [0.0, 0.2, 0.5, 0.8]), entropy.max()),
    )
    counts = ledger.histogram2d(d_edges, e_edges, **PRIOR, step=6)
    expected = np.histogram2d(difficulty[used], entropy, bins=(d_edges, e_edges))[0]
    assert counts.shape == (5, 4)
    assert counts.sum() > 100
    np.testing.assert_array_equal(counts, expected)
    q = np.array([0.0, 0.1, 0.5, 0.77, 1.0])
    np.testing.assert_allclose(ledger.quantiles(q, **PRIOR, step=6), np.quantile(difficulty, q), rtol=1e-15)
    with pytest.raises(ValueError, match=r"q\[0\]=1.5"):
        ledger.quantiles(nats(1.5), **PRIOR, step=6)
    with pytest.raises(ValueError, match="strictly ascending"):
        ledger.histogram2d(nats(0, 0), e_edges, **PRIOR, step=6)
    with pytest.raises(ValueError, match="empty"):
        DifficultyLedger(0.9, 0).quantiles(q, **PRIOR, step=6)


@pytest.mark.parametrize("hint", [0, 200_000])
def test_at_most_64_bytes_per_prompt_while_it_grows(hint: int) -> None:
    ledger = DifficultyLedger(0.9, hint)
    one = np.ones(10_000, dtype=np.int64)
    for start in range(0, 200_000, 10_000):
        prompts = np.arange(start, start + 10_000, dtype=np.uint64)
        ledger.update(prompts, one, one, one.astype(np.float64), one, step=0)
        if start >= 50_000 and not hint:
            assert ledger.nbytes / len(ledger) <= 64
    assert len(ledger) == 200_000
    assert ledger.nbytes / len(ledger) <= 64
    assert (ledger.lookup(np.arange(200_000, dtype=np.uint64)).attempts == 1).all()


def test_a_copy_has_the_same_records_and_a_life_of_its_own() -> None:
    ledger, _ = random_ledger(seed=6, num_prompts=2000)
    copy = ledger.copy()
    assert copy == ledger and copy.decay == 0.9
    before = copy.export().as_dict()
    add(ledger, 42, attempts=4, successes=1, step=9)
    for name, column in copy.export().as_dict().items():
        assert column.tolist() == before[name].tolist()
    add(copy, 42, attempts=4, successes=1, step=9)
    assert copy == ledger


@pytest.mark.parametrize("end", [0, 2**64 - 1])
def test_prompts_whose_keys_lie_at_one_end_are_found(end: int) -> None:
    """Keys are splitmix64 of ids: these crowd at the first or behind the last place of the table."""
    prompts = np.array([inverse_splitmix64(abs(end - i)) for i in range(500)], dtype=np.uint64)
    ledger = DifficultyLedger(0.9, 0)
    one = np.ones(1, dtype=np.int64)
    for prompt in np.random.default_rng(0).permutation(prompts):
        ledger.update(np.array([prompt]), one, one, one * 1.0, one, step=0)
    assert len(ledger) == 500
    assert ledger.lookup(prompts).attempts.tolist() == [1] * 500
    assert ledger.lookup(prompts + np.uint64(1)).attempts.tolist() == [0] * 500


def inverse_splitmix64(x: int) -> int:
    mask = 2**64 - 1

    def unshift(y: int, shift: int) -> int:
        found = y
        for _ in range(64 // shift):
            found = y ^ (found >> shift)
        return found

    x = unshift(x, 31) * pow(0x94D049BB133111EB, -1, 2**64) & mask
    x = unshift(x, 27) * pow(0xBF58476D1CE4E5B9, -1, 2**64) & mask
    return (unshift(x, 30) - 0x9E3779B97F4A7C15) & mask


# Algebra: splits and orders of a batch do not matter, and a file or a copy is the ledger

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


def add_batch(ledger: DifficultyLedger | ReferenceLedger, batch: list[Entry], step: int) -> None:
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
        add_batch(ledger, batch, step)
    return ledger


@properties
@given(DECAY, STEPS)
def test_matches_the_reference(decay: float, steps: list[list[Entry]]) -> None:
    ledger, reference = build(decay, steps), ReferenceLedger(decay)
    for step, batch in enumerate(steps):
        add_batch(reference, batch, step)
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
    add_batch(whole, batch, step=9)
    shuffled = list(batch)
    random.shuffle(shuffled)
    for piece in range(num_pieces):
        add_batch(pieces, shuffled[piece::num_pieces], step=9)
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

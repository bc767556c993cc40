"""Packing: who gets which sequence, what padding and balance cost, and the arrays of a micro-batch by hand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aer_megatron.actor.batching import MicroBatch, packed_micro_batches, padded_micro_batches
from aer_megatron.actor.packing import TokenCut, context_positions, pack_micro_batches, padded_lengths, sequence_costs
from aer_megatron.algo.experience import sampled_mask
from aer_megatron.config import Config
from aer_megatron.types import PackedSequences
from benchmarks.bench_packing import FORMS, MODEL, RANKS, draw_lengths, measure
from tests.support.experiences import random_mask

# prompts [5 6] and [3], responses [7 1] and [8 9 2]
TWO = PackedSequences(np.array([2, 1]), np.array([2, 3]), np.array([5, 6, 7, 1, 3, 8, 9, 2]))
BOTH = np.array([0, 1])
WHOLE = TokenCut()


def plan(length_B: np.ndarray, ranks: int, budget: int, *, multiple: int = 1, cut: TokenCut = WHOLE) -> list[Any]:
    cost_B = length_B * length_B
    everyone = np.arange(len(length_B))
    return [
        pack_micro_batches(everyone, length_B, cost_B, ranks=(rank, ranks), budget=budget, multiple=multiple, cut=cut)
        for rank in range(ranks)
    ]


def test_a_packed_row_by_hand() -> None:
    (micro,) = packed_micro_batches(TWO, [BOTH], TokenCut(), same_shape=False)
    assert micro.tokens_bS.tolist() == [[5, 6, 7, 1, 3, 8, 9, 2]]
    assert micro.row_t.tolist() == [1, 2, 4, 5, 6]
    assert micro.label_t.tolist() == [7, 1, 8, 9, 2]
    assert micro.packed_t.tolist() == [0, 1, 2, 3, 4]
    assert micro.sequence_t.tolist() == [0, 0, 1, 1, 1]
    assert micro.packed_length_n is not None and micro.packed_length_n.tolist() == [4, 4]


def test_a_row_with_a_tool_s_words_by_hand() -> None:
    # the policy sampled the 1 of the first response, the 8 and the 2 of the second
    sampled_L = np.array([0, 0, 0, 1, 0, 1, 0, 1], dtype=np.bool_)
    (micro,) = packed_micro_batches(replace(TWO, sampled_L=sampled_L), [BOTH], TokenCut(), same_shape=False)
    assert micro.tokens_bS.tolist() == [[5, 6, 7, 1, 3, 8, 9, 2]]
    assert micro.row_t.tolist() == [2, 4, 6]
    assert micro.label_t.tolist() == [1, 8, 2]
    assert micro.packed_t.tolist() == [0, 1, 2]
    assert micro.sequence_t.tolist() == [0, 1, 1]


def test_a_context_parallel_share_by_hand() -> None:
    # chunks of one token: rank 0 of 2 has tokens 0 and 3 of each sequence, rank 1 has 1 and 2
    first, second = (packed_micro_batches(TWO, [BOTH], TokenCut(rank, 2), same_shape=False)[0] for rank in (0, 1))
    assert first.tokens_bS.tolist() == [[5, 1, 3, 2]]
    assert second.tokens_bS.tolist() == [[6, 7, 8, 9]]
    assert first.row_t.tolist() == [2] and first.label_t.tolist() == [8]  # the prompt [3] is scored on rank 0
    assert second.row_t.tolist() == [0, 1, 2, 3] and second.label_t.tolist() == [7, 1, 9, 2]
    assert sorted([*first.packed_t, *second.packed_t]) == [0, 1, 2, 3, 4]


def test_rectangles_and_one_shape_for_all_by_hand() -> None:
    parts = [np.array([1]), BOTH, BOTH[:0]]
    free = padded_micro_batches(TWO, parts, TokenCut(shards=3), same_shape=False)
    assert [micro.tokens_bS.shape for micro in free] == [(1, 6), (2, 6), (1, 3)]
    assert free[1].row_t.tolist() == [1, 2, 6, 7, 8]
    same = padded_micro_batches(TWO, parts, TokenCut(shards=3), same_shape=True)
    assert [micro.tokens_bS.shape for micro in same] == [(2, 6)] * 3
    rows = packed_micro_batches(TWO, parts, TokenCut(), same_shape=True)
    assert [micro.tokens_bS.shape for micro in rows] == [(1, 8)] * 3
    assert same[2].row_t.size == rows[2].row_t.size == 0


def test_costs_by_hand() -> None:
    # one layer, hidden 4, two heads of 2, ffn 8: N = 4 * (4 + 8) + 4 * 4 + 3 * 4 * 8 = 160, A = 4
    sizes = SimpleNamespace(
        num_layers=1, hidden_size=4, ffn_hidden_size=8, padded_heads=2, padded_kv_heads=2, head_dim=2, moe=None
    )
    assert sequence_costs(np.array([0, 1, 40]), sizes).tolist() == [0, round(64 * 1.025), 64 * (40 + 40)]  # type: ignore[arg-type]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 90), min_size=1, max_size=40),
    st.integers(1, 5),
    st.sampled_from([16, 64, 200]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([TokenCut(), TokenCut(0, 2), TokenCut(0, 2, 4), TokenCut(shards=8)]),
)
def test_every_sequence_once_within_the_budget(
    lengths: list[int], ranks: int, budget: int, multiple: int, cut: TokenCut
) -> None:
    length_B = np.array(lengths, dtype=np.int64)
    plans = plan(length_B, ranks, budget, multiple=multiple, cut=cut)
    assert len({len(parts) for parts in plans}) == 1
    assert len(plans[0]) % multiple == 0
    assert sorted(index for parts in plans for part in parts for index in part) == list(range(len(lengths)))
    longest = -(-max(lengths) // cut.total_multiple) * cut.total_multiple
    for part in (part for parts in plans for part in parts):
        widths = padded_lengths(length_B[part], cut)
        assert widths.sum() <= max(budget, longest + cut.total_multiple)
        assert widths.sum() % cut.total_multiple == 0
        assert not np.any(widths % cut.sequence_multiple)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=8),
    st.sampled_from([2, 4]),
    st.none() | st.integers(0, 2**31),
)
def test_context_ranks_share_the_rows_of_one(lengths: list[tuple[int, int]], cp: int, mask: int | None) -> None:
    prompt_B, response_B = (np.array(column, dtype=np.int64) for column in zip(*lengths, strict=True))
    tokens = np.arange(int((prompt_B + response_B).sum()))
    sequences, everyone = PackedSequences(prompt_B, response_B, tokens), np.arange(len(lengths))
    if mask is not None:
        sequences = replace(sequences, sampled_L=random_mask(sequences, mask))
    for build in (packed_micro_batches, padded_micro_batches):
        shares = [build(sequences, [everyone], TokenCut(rank, cp), same_shape=False)[0] for rank in range(cp)]
        (whole,) = build(sequences, [everyone], TokenCut(), same_shape=False)
        found = {key: value for share in shares for key, value in _rows(share)}
        assert found == dict(_rows(whole))
        assert sum(len(share.row_t) for share in shares) == len(whole.row_t)
        # each sampled token once, in the order of the batch, behind the token that predicts it
        np.testing.assert_array_equal(whole.packed_t, np.arange(sequences.num_sampled_tokens))
        np.testing.assert_array_equal(whole.label_t, np.flatnonzero(sampled_mask(sequences)))
        np.testing.assert_array_equal(whole.tokens_bS.reshape(-1)[whole.row_t], whole.label_t - 1)


def _rows(micro: MicroBatch) -> list[tuple[int, tuple[int, int, int]]]:
    """(place in the batch, (token that predicts, its label, sequence)); tokens are unique numbers here."""
    scored = micro.tokens_bS.reshape(-1)[micro.row_t]
    values = zip(scored.tolist(), micro.label_t.tolist(), micro.sequence_t.tolist(), strict=True)
    return list(zip(micro.packed_t.tolist(), values, strict=True))


def test_a_sequence_over_the_budget_is_alone() -> None:
    (parts,) = plan(np.array([100, 3, 4, 5]), 1, 16)
    assert [part.tolist() for part in parts] == [[0], [1, 2, 3]]


def test_ranks_without_sequences_have_empty_micro_batches() -> None:
    plans = plan(np.array([9, 9]), 3, 9)
    assert [[part.tolist() for part in parts] for parts in plans] == [[[0]], [[1]], [[]]]


@pytest.mark.parametrize("kind", ["gsm8k", "long tail"])
def test_padding_and_balance_over_eight_ranks(kind: str, tmp_path: Any) -> None:
    length_B = draw_lengths(kind, np.random.default_rng(3), tmp_path / "absent")
    figures = measure(length_B, FORMS["ours"](length_B), rectangles=False)
    assert len(FORMS["ours"](length_B)) == RANKS == 8
    assert figures.padding <= 0.02
    assert figures.imbalance <= 0.03
    assert sequence_costs(np.array([1]), MODEL).tolist() == [64]


def test_positions_of_whole_sequences_need_no_padding() -> None:
    assert context_positions(np.array([3, 2]), cp_rank=0, cp_size=1).tolist() == [0, 1, 2, 3, 4]
    assert context_positions(np.array([4, 8]), cp_rank=0, cp_size=2).tolist() == [0, 3, 4, 5, 10, 11]
    assert context_positions(np.array([4, 8]), cp_rank=1, cp_size=2).tolist() == [1, 2, 6, 7, 8, 9]


def config(**parallel: Any) -> Any:
    return Config.from_table(
        {
            "model": {"path": "unused"},
            "data": {"train": {"task": "countdown"}, "max_prompt_tokens": 10},
            "rollout": {"max_new_tokens": 91},
            "parallel": parallel,
        }
    )


def test_the_longest_sequence_must_fit_the_budget() -> None:
    config(tokens_per_micro_batch=101)
    config(tokens_per_micro_batch=104, cp=2, tp=4, sequence_parallel=True)
    with pytest.raises(ValueError, match=r"parallel.tokens_per_micro_batch=100 must hold .* = 101 \(padded: 101\)"):
        config(tokens_per_micro_batch=100)
    with pytest.raises(ValueError, match=r"= 101 \(padded: 104\); set at least 104, or 0"):
        config(tokens_per_micro_batch=101, cp=2)


def test_layouts_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"parallel.vpp=2 needs parallel.pp > 1"):
        config(vpp=2)
    with pytest.raises(ValueError, match=r"tp=2 \* parallel.pp=1 \* parallel.cp=3 = 6 must divide .* 8; .*tp/pp/cp"):
        config(tp=2, cp=3).check_world_size(8)
    with pytest.raises(ValueError, match=r"parallel.ep=3 must divide the dp \* cp = 4 \* 2 ranks .*\[1, 2, 4, 8\]"):
        config(cp=2, ep=3).check_world_size(8)
    assert config(cp=2, ep=4).check_world_size(8) == 4

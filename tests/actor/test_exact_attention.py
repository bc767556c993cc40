"""Attention of one rank against the textbook form: padded, packed, grouped queries, isolation of packed sequences."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from aer_megatron.actor.attention import ExactAttention

HEADS, GROUPS, SIZE = 4, 2, 8


def attention(**changes: object) -> ExactAttention:
    config = {"attention_dropout": 0.0, "softmax_type": "vanilla", "window_size": None, "context_parallel_size": 1}
    return ExactAttention(SimpleNamespace(**config | changes), 1, None, "self")  # type: ignore[arg-type]


def textbook(query_lhd: Tensor, key_lgd: Tensor, value_lgd: Tensor) -> Tensor:
    """Returns [l, h d] of one sequence by an explicit score matrix."""
    repeat = query_lhd.shape[1] // key_lgd.shape[1]
    key, value = (x.repeat_interleave(repeat, dim=1) for x in (key_lgd, value_lgd))
    scores_hll = torch.einsum("ihd,jhd->hij", query_lhd, key) / query_lhd.shape[-1] ** 0.5
    length = query_lhd.shape[0]
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = scores_hll.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, value).flatten(1)


def packed(lengths: list[int]) -> PackedSeqParams:
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends)


def inputs(tokens: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(tokens, HEADS, SIZE), (tokens, GROUPS, SIZE), (tokens, GROUPS, SIZE)]
    return [torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("lengths", [[5], [3, 3, 3], [1, 4, 4, 2, 7, 7], [2, 1, 2]])
def test_packed_equals_one_sequence_at_a_time(lengths: list[int]) -> None:
    tensors = inputs(sum(lengths))
    out = attention()(*tensors, packed_seq_params=packed(lengths))
    pieces = zip(*(x.split(lengths) for x in tensors), strict=True)
    wanted = torch.cat([textbook(*piece) for piece in pieces])
    assert torch.allclose(out, wanted, atol=1e-12)
    weight = torch.randn_like(wanted)
    for mine, theirs in zip(
        torch.autograd.grad((out * weight).sum(), tensors),
        torch.autograd.grad((wanted * weight).sum(), tensors),
        strict=True,
    ):
        assert torch.allclose(mine, theirs, atol=1e-12)


def test_padded_equals_the_textbook() -> None:
    length, sequences = 6, 3
    tensors = [x.unflatten(0, (length, sequences)) for x in inputs(length * sequences)]
    out = attention()(*tensors)
    for index in range(sequences):
        assert torch.allclose(out[:, index], textbook(*(x[:, index] for x in tensors)), atol=1e-12)


def test_another_sequence_changes_no_bit() -> None:
    lengths = [4, 4, 9, 4]
    before = [x.detach().clone() for x in inputs(sum(lengths), torch.float32)]
    after = [x.clone() for x in before]
    for x in after:
        x[4:8] += 1.0  # the second sequence
    first, second = (attention()(*x, packed_seq_params=packed(lengths)) for x in (before, after))
    assert not torch.equal(first[4:8], second[4:8])
    assert torch.equal(first[:4], second[:4]) and torch.equal(first[8:], second[8:])


def test_a_form_it_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="window_size=4"):
        attention(window_size=4)

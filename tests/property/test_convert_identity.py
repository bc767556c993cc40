"""HF -> shards -> HF is the identity, and the shards are a partition of the whole parameter."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aer_megatron.convert.architecture import (
    ModelArchitecture,
    architecture_from_hf_config,
    check_parallel,
    pad_query_groups,
    padded_vocab_size,
)
from aer_megatron.convert.mapping import hf_names, hf_to_shard, megatron_names, shards_to_hf, tp_axis

HF_ARCHITECTURES = [
    "Qwen3ForCausalLM",
    "Qwen2ForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen3MoeForCausalLM",
]


@st.composite
def models(draw: st.DrawFn) -> tuple[ModelArchitecture, int, int]:
    """(architecture, tp, padded vocabulary); heads are padded only where tp does not fit them."""
    tp = draw(st.sampled_from([1, 2, 4]))
    num_kv_heads = draw(st.integers(1, 5))
    num_heads = num_kv_heads * draw(st.integers(1, 3))
    config: dict[str, Any] = {
        "architectures": [draw(st.sampled_from(HF_ARCHITECTURES))],
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": draw(st.sampled_from([2, 4])),
        "hidden_size": 4 * draw(st.integers(1, 3)),
        "intermediate_size": 4 * draw(st.integers(1, 3)),
        "moe_intermediate_size": 4 * draw(st.integers(1, 2)),
        "num_experts": draw(st.integers(1, 3)),
        "num_experts_per_tok": 1,
        "num_hidden_layers": draw(st.integers(1, 3)),
        "max_position_embeddings": 16,
        "sliding_window": None,
        "tie_word_embeddings": draw(st.booleans()),
        "vocab_size": draw(st.integers(1, 23)),
    }
    arch = pad_query_groups(architecture_from_hf_config(config), tp)
    check_parallel(arch, tp, 1)
    return arch, tp, padded_vocab_size(arch.vocab_size, tp, divisible_by=draw(st.sampled_from([1, 3, 8])))


def numbered(arch: ModelArchitecture) -> dict[str, Tensor]:
    """Tensors whose every element is different and positive, so that any misplaced element shows."""
    tensors, start = {}, 1
    for name, shape in hf_names(arch).items():
        size = int(torch.Size(shape).numel())
        tensors[name] = torch.arange(start, start + size, dtype=torch.int32).view(shape)
        start += size
    return tensors


@settings(max_examples=80, deadline=None)
@given(models(), st.booleans())
def test_round_trip_is_the_identity(model: tuple[ModelArchitecture, int, int], te_spec: bool) -> None:
    arch, tp, padded_vocab = model
    tensors = numbered(arch)
    back: dict[str, Tensor] = {}
    for name in megatron_names(arch, range(arch.num_layers), True, True, te_spec=te_spec):
        shards = [
            hf_to_shard(arch, name, tensors.__getitem__, tp_rank=rank, tp_size=tp, padded_vocab=padded_vocab)
            for rank in range(tp)
        ]
        for hf_name, tensor in shards_to_hf(arch, name, shards):
            assert hf_name not in back
            back[hf_name] = tensor
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


@settings(max_examples=40, deadline=None)
@given(models())
def test_shards_hold_every_element_once_and_zeros(model: tuple[ModelArchitecture, int, int]) -> None:
    """The shards of all ranks hold each checkpoint element exactly once; the rest is zero."""
    arch, tp, padded_vocab = model
    tensors = numbered(arch)
    held = []
    for name in megatron_names(arch, range(arch.num_layers), True, True):
        ranks = range(1 if tp_axis(arch, name) is None else tp)
        held += [
            hf_to_shard(arch, name, tensors.__getitem__, tp_rank=rank, tp_size=tp, padded_vocab=padded_vocab).flatten()
            for rank in ranks
        ]
    elements = torch.cat(held)
    total = sum(tensor.numel() for tensor in tensors.values())
    assert torch.equal(elements[elements != 0].sort().values, torch.arange(1, total + 1, dtype=torch.int32))

"""HF -> shards -> HF is the identity, and the shards are a partition of the whole parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aer_megatron.convert.architecture import ModelArchitecture, check_parallel, pad_query_groups, padded_vocab_size
from aer_megatron.convert.hf_config import architecture_from_hf_config
from aer_megatron.convert.mapping import hf_names, hf_to_shard, megatron_names, shards_to_hf, tp_axis
from aer_megatron.convert.stream import iter_stored_as_hf, stored_architecture, write_megatron


class Memory:
    """A distributed checkpoint in a dictionary: both the writer and the reader of convert/stream.py."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def add(self, key: str, chunk: Tensor, *, offset: Sequence[int], whole: Sequence[int]) -> None:
        target = self.tensors.setdefault(key, torch.full(tuple(whole), -1, dtype=chunk.dtype))
        place = target[tuple(offset[: len(whole) - chunk.dim()])]
        place[offset[-chunk.dim()] : offset[-chunk.dim()] + len(chunk)] = chunk

    def add_empty_object(self, key: str) -> None:
        assert "_extra_state/shard_" in key

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: tuple(tensor.shape) for key, tensor in self.tensors.items()}

    def dtype(self, key: str) -> torch.dtype:
        return self.tensors[key].dtype

    def read(self, key: str, index: tuple[int, ...]) -> Tensor:
        return self.tensors[key][index]


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


@settings(max_examples=80, deadline=None)
@given(models())
def test_the_stored_form_is_complete_and_converts_back(model: tuple[ModelArchitecture, int, int]) -> None:
    arch, _, _ = model
    tensors = numbered(arch)
    memory = Memory()
    sizes: list[int] = []
    write_megatron(arch, tensors.__getitem__, memory, dtype=None, advance=sizes.append)
    assert all(int(tensor.min()) >= 0 for tensor in memory.tensors.values())  # every element was written
    # config.json knows nothing of padding: the reader finds it in the shapes
    padded = stored_architecture(replace(arch, num_padding_groups=0), memory)
    assert padded == arch
    back = dict(iter_stored_as_hf(padded, memory))
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    padding = arch.num_padding_groups > 0
    assert padding or sum(sizes) == sum(tensor.nbytes for tensor in tensors.values())


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

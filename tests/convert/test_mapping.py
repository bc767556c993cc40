"""The tables against hand-laid tensors and against real transformers models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from aer_megatron.convert.architecture import ModelArchitecture, check_parallel, pad_query_groups, padded_vocab_size
from aer_megatron.convert.hf_config import architecture_from_hf_config
from aer_megatron.convert.mapping import (
    check_hf_tensors,
    hf_names,
    hf_tensors_of,
    hf_to_shard,
    megatron_names,
    shard_shape,
    shards_to_hf,
    tp_axis,
)
from aer_megatron.convert.stream import iter_stored_as_hf, stored_architecture, write_megatron

TINY: dict[str, Any] = {
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
MOE = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 6}
MODELS = [
    (Qwen3ForCausalLM, Qwen3Config(**TINY, head_dim=6)),
    (Qwen3ForCausalLM, Qwen3Config(**TINY, head_dim=6, tie_word_embeddings=True)),
    (Qwen2ForCausalLM, Qwen2Config(**TINY)),
    (LlamaForCausalLM, LlamaConfig(**TINY, tie_word_embeddings=True)),
    (MistralForCausalLM, MistralConfig(**TINY, sliding_window=None)),
    (Qwen3MoeForCausalLM, Qwen3MoeConfig(**TINY, **MOE)),
]


def _arch(**changes: Any) -> ModelArchitecture:
    config = {"architectures": ["Qwen3ForCausalLM"], "head_dim": 6, **TINY, **changes}
    return architecture_from_hf_config(config)


def _random(arch: ModelArchitecture) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in hf_names(arch).items()}


@pytest.mark.parametrize(("model_type", "config"), MODELS, ids=lambda value: getattr(value, "model_type", ""))
def test_names_and_shapes_equal_a_saved_transformers_model(
    model_type: type[PreTrainedModel], config: Any, tmp_path: Path
) -> None:
    """What save_pretrained writes is the format; the in-memory state dict of MoE models fuses experts."""
    model = model_type(config)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as saved:
        shapes = {name: tuple(saved.get_slice(name).get_shape()) for name in saved.keys()}  # noqa: SIM118
    arch = architecture_from_hf_config(model.config.to_dict())
    assert hf_names(arch) == shapes


def test_qkv_rows_by_hand() -> None:
    """4 query heads, 2 groups, head_dim 1: whole matrix is q0 q1 k0 v0 | q2 q3 k1 v1."""
    arch = replace(_arch(hidden_size=1), head_dim=1)
    tensors = {
        "model.layers.1.self_attn.q_proj.weight": torch.tensor([[1.0], [2.0], [3.0], [4.0]]),
        "model.layers.1.self_attn.k_proj.weight": torch.tensor([[10.0], [20.0]]),
        "model.layers.1.self_attn.v_proj.weight": torch.tensor([[100.0], [200.0]]),
    }
    name = "decoder.layers.1.self_attention.linear_qkv.weight"
    expected = {
        1: [[1, 2, 10, 100, 3, 4, 20, 200]],
        2: [[1, 2, 10, 100], [3, 4, 20, 200]],
        4: [[1, 2], [10, 100], [3, 4], [20, 200]],  # fewer KV heads than ranks: equal blocks, groups cut
    }
    for size, ranks in expected.items():
        for rank, rows in enumerate(ranks):
            shard = hf_to_shard(arch, name, tensors.__getitem__, tp_rank=rank, tp_size=size, padded_vocab=12)
            assert shard.flatten().tolist() == rows


def test_padded_groups_by_hand() -> None:
    """3 heads in 3 groups on 2 ranks: a fourth, zero group, and a zero column of the output projection."""
    arch = pad_query_groups(replace(_arch(num_attention_heads=3, num_key_value_heads=3, hidden_size=1), head_dim=1), 2)
    layer = "model.layers.0.self_attn."
    tensors = {f"{layer}{p}_proj.weight": torch.tensor([[1.0], [2.0], [3.0]]) * s for p, s in zip("qkv", (1, 10, 100))}
    tensors[f"{layer}o_proj.weight"] = torch.tensor([[5.0, 6.0, 7.0]])
    shards = {
        name: [
            hf_to_shard(arch, name, tensors.__getitem__, tp_rank=rank, tp_size=2, padded_vocab=12).flatten().tolist()
            for rank in (0, 1)
        ]
        for name in (
            "decoder.layers.0.self_attention.linear_qkv.weight",
            "decoder.layers.0.self_attention.linear_proj.weight",
        )
    }
    assert list(shards.values()) == [[[1, 10, 100, 2, 20, 200], [3, 30, 300, 0, 0, 0]], [[5, 6], [7, 0]]]


def test_gate_up_and_vocabulary_by_hand() -> None:
    arch = _arch(intermediate_size=4, hidden_size=1, vocab_size=3, num_attention_heads=2)
    tensors = {
        "model.layers.0.mlp.gate_proj.weight": torch.tensor([[1.0], [2.0], [3.0], [4.0]]),
        "model.layers.0.mlp.up_proj.weight": torch.tensor([[10.0], [20.0], [30.0], [40.0]]),
        "model.embed_tokens.weight": torch.tensor([[7.0], [8.0], [9.0]]),
    }

    def shards(name: str, size: int, padded_vocab: int) -> list[list[float]]:
        return [
            hf_to_shard(arch, name, tensors.__getitem__, tp_rank=rank, tp_size=size, padded_vocab=padded_vocab)
            .flatten()
            .tolist()
            for rank in range(size)
        ]

    assert shards("decoder.layers.0.mlp.linear_fc1.weight", 2, 4) == [[1, 2, 10, 20], [3, 4, 30, 40]]
    assert shards("embedding.word_embeddings.weight", 2, 4) == [[7, 8], [9, 0]]
    assert shards("embedding.word_embeddings.weight", 4, 8) == [[7, 8], [9, 0], [0, 0], [0, 0]]


def test_megatron_names_of_stages() -> None:
    arch = _arch(tie_word_embeddings=True)
    whole = megatron_names(arch, range(2), True, True)
    assert whole[0] == "embedding.word_embeddings.weight" and "output_layer.weight" not in whole
    last = megatron_names(arch, range(1, 2), False, True)
    assert "output_layer.weight" in last and "decoder.layers.1.mlp.linear_fc2.weight" in last
    assert not any(".layers.0." in name or name.startswith("embedding") for name in last)
    middle = megatron_names(arch, range(1, 2), False, False)
    assert set(last) - set(middle) == {"decoder.final_layernorm.weight", "output_layer.weight"}
    assert "output_layer.weight" in megatron_names(replace(arch, tied_embeddings=False), range(2), True, True)


def test_a_tied_last_stage_reads_the_embedding_and_writes_nothing() -> None:
    arch = _arch(tie_word_embeddings=True)
    tensors = _random(arch)
    shard = hf_to_shard(arch, "output_layer.weight", tensors.__getitem__, tp_rank=1, tp_size=2, padded_vocab=12)
    assert torch.equal(shard[:5], tensors["model.embed_tokens.weight"][6:])
    assert shards_to_hf(arch, "output_layer.weight", [shard, shard]) == []


def test_transformer_engine_names_are_the_same_parameters() -> None:
    arch = _arch()
    local = megatron_names(arch, range(2), True, True)
    engine = megatron_names(arch, range(2), True, True, te_spec=True)
    assert "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight" in engine
    assert "decoder.layers.1.mlp.linear_fc1.layer_norm_weight" in engine
    assert [hf_tensors_of(arch, name) for name in local] == [hf_tensors_of(arch, name) for name in engine]


def test_both_spellings_of_experts() -> None:
    arch = _arch(architectures=["Qwen3MoeForCausalLM"], **MOE)
    engine = megatron_names(arch, range(2), True, True, te_spec=True)
    assert "decoder.layers.1.mlp.experts.linear_fc1.weight2" in engine
    grouped = hf_tensors_of(arch, "decoder.layers.1.mlp.experts.linear_fc1.weight2")
    assert grouped == hf_tensors_of(arch, "decoder.layers.1.mlp.experts.local_experts.2.linear_fc1.weight")
    assert list(grouped) == [f"model.layers.1.mlp.experts.2.{half}_proj.weight" for half in ("gate", "up")]


def test_shard_shapes_and_axes_are_those_of_the_shards() -> None:
    arch = _arch(architectures=["Qwen3MoeForCausalLM"], **MOE)
    tensors = _random(arch)
    for name in megatron_names(arch, range(2), True, True):
        shard = hf_to_shard(arch, name, tensors.__getitem__, tp_rank=0, tp_size=2, padded_vocab=12)
        whole = hf_to_shard(arch, name, tensors.__getitem__, tp_rank=0, tp_size=1, padded_vocab=12)
        assert tuple(shard.shape) == shard_shape(arch, name, tp_size=2, padded_vocab=12)
        split = [axis for axis in range(whole.dim()) if whole.shape[axis] != shard.shape[axis]]
        axis = tp_axis(arch, name)
        assert split == ([] if axis is None else [axis])


@pytest.mark.parametrize(
    "name",
    [
        "decoder.layers.0.self_attention.linear_qkv.bias",  # Qwen3 has none
        "decoder.layers.2.mlp.linear_fc2.weight",
        "decoder.layers.0.mlp.router.weight",
        "module.decoder.final_layernorm.weight",
        "decoder.final_layernorm.weights",
    ],
)
def test_a_name_outside_the_table_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        hf_tensors_of(_arch(), name)


def test_mis_shaped_tensors_are_refused_in_both_directions() -> None:
    arch = _arch()
    name = "decoder.layers.0.mlp.linear_fc2.weight"
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj\.weight has shape \(8, 13\), expected \(8, 12\)"):
        hf_to_shard(arch, name, lambda _: torch.zeros(8, 13), tp_rank=0, tp_size=2, padded_vocab=12)
    with pytest.raises(ValueError, match="of tp rank 1 has shape"):
        shards_to_hf(arch, name, [torch.zeros(8, 6), torch.zeros(8, 5)])
    with pytest.raises(ValueError, match="no shards"):
        shards_to_hf(arch, name, [])
    with pytest.raises(ValueError, match="10 rows in all, the vocabulary has 11"):
        shards_to_hf(arch, "output_layer.weight", [torch.zeros(5, 8), torch.zeros(5, 8)])
    with pytest.raises(ValueError, match="tp=5 does not divide"):
        hf_to_shard(arch, name, lambda _: torch.zeros(8, 12), tp_rank=0, tp_size=5, padded_vocab=15)
    with pytest.raises(ValueError, match="tp_rank=2"):
        hf_to_shard(arch, name, lambda _: torch.zeros(8, 12), tp_rank=2, tp_size=2, padded_vocab=12)


def test_check_hf_tensors() -> None:
    arch = _arch(tie_word_embeddings=True)
    tensors = _random(arch)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def check(changed: dict[str, tuple[int, ...]], **more: Tensor) -> None:
        named = tensors | {key.replace("__", "."): value for key, value in more.items()}
        check_hf_tensors(arch, changed, named.__getitem__)

    check(shapes | {"model.layers.0.self_attn.rotary_emb.inv_freq": (3,)})
    with_head = shapes | {"lm_head.weight": (11, 8)}
    check(with_head, lm_head__weight=tensors["model.embed_tokens.weight"].clone())
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        check(with_head, lm_head__weight=torch.zeros(11, 8))
    with pytest.raises(ValueError, match=r"1 unexpected: model\.layers\.9\.x"):
        check(shapes | {"model.layers.9.x": (1,)})
    with pytest.raises(ValueError, match=r"1 missing: model\.norm\.weight"):
        check({name: shape for name, shape in shapes.items() if name != "model.norm.weight"})
    with pytest.raises(ValueError, match=r"1 of another shape: model\.norm\.weight \(9,\) \(expected \(8,\)\)"):
        check(shapes | {"model.norm.weight": (9,)})


def test_padded_groups_change_nothing_and_receive_no_gradient() -> None:
    """A transformers model with the padded tensors gives the same logits; zero heads get zero gradients."""
    torch.manual_seed(0)
    narrow_sizes = TINY | {
        "hidden_size": 24,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 4,
    }
    model = LlamaForCausalLM(LlamaConfig(**narrow_sizes)).double()
    wide_sizes = narrow_sizes | {"num_attention_heads": 8, "num_key_value_heads": 4}
    wide = LlamaForCausalLM(LlamaConfig(**wide_sizes)).double()
    arch = pad_query_groups(architecture_from_hf_config(model.config.to_dict()), 2)
    # seen from Megatron the padded model is a model of 8 heads: its HF tensors are read under that name
    whole = replace(arch, num_heads=8, num_kv_heads=4, num_padding_groups=0)
    state = model.state_dict()
    padded = {
        hf_name: tensor
        for name in megatron_names(arch, range(2), True, True)
        for hf_name, tensor in shards_to_hf(
            whole, name, [hf_to_shard(arch, name, state.__getitem__, tp_rank=0, tp_size=1, padded_vocab=11)]
        )
    }
    wide.load_state_dict(padded)
    tokens = torch.arange(10)[None]
    for each in (model, wide):
        each(tokens).logits.logsumexp(-1).sum().backward()
    torch.testing.assert_close(wide(tokens).logits, model(tokens).logits, rtol=0, atol=1e-12)
    attention, narrow = wide.model.layers[1].self_attn, model.model.layers[1].self_attn
    for projection, real in (("q_proj", 24), ("k_proj", 12), ("v_proj", 12)):
        grad = getattr(attention, projection).weight.grad
        torch.testing.assert_close(grad[:real], getattr(narrow, projection).weight.grad)
        assert grad[real:].numel() and not grad[real:].any()
    assert not attention.o_proj.weight.grad[:, 24:].any()
    torch.testing.assert_close(attention.o_proj.weight.grad[:, :24], narrow.o_proj.weight.grad)


# Laws: HF -> shards -> HF is the identity, and the shards are a partition of the whole parameter


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

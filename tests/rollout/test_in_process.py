"""Verified weight transport: what arrives damaged is named, and the old weights stay in service."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config

from aer_megatron.rollout.checksum import tensor_checksum
from aer_megatron.rollout.embedded import EmbeddedEngine
from aer_megatron.rollout.engine import GenerateRequest, SamplingOptions
from aer_megatron.rollout.in_process import InProcessSync

NAME = "model.layers.0.mlp.up_proj.weight"
OPTIONS = SamplingOptions(1.0, 1.0, 0, frozenset({2}))
REQUESTS = [GenerateRequest((3, 1), seed, 6) for seed in range(4)]


def tiny_config() -> Qwen3Config:
    return Qwen3Config(
        vocab_size=13,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )


def weights(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config())
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


class DamagingEngine(EmbeddedEngine):
    """Damages what arrives, as a broken transport would: after it was sent, before it is stored."""

    damage = ""

    def receive_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
        return super().receive_weights(self._damaged(tensors))

    def _damaged(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            if name == NAME and self.damage == "bit":
                tensor = tensor.clone()
                tensor.view(torch.int32)[3, 5] ^= 1
            elif self.damage == "swap" and name in (NAME, NAME.replace("up_", "gate_")):
                other = NAME if "gate_" in name else NAME.replace("up_", "gate_")
                tensor = weights(1)[other]
            yield name, tensor


def make(engine_class: type[EmbeddedEngine] = EmbeddedEngine) -> tuple[EmbeddedEngine, InProcessSync]:
    engine = engine_class(
        tiny_config(),
        dtype=torch.float32,
        device=torch.device("cpu"),
        max_batch_size=8,
    )
    return engine, InProcessSync(engine, fp8=False)


def test_published_weights_serve_under_their_version() -> None:
    engine, sync = make()
    sync.publish(weights(0).items(), version=7)
    assert engine.policy_version == 7
    first = engine.generate(REQUESTS, OPTIONS)
    assert {completion.policy_versions[0].version for completion in first} == {7}
    sync.publish(weights(1).items(), version=8)
    assert [c.token_ids for c in engine.generate(REQUESTS, OPTIONS)] != [c.token_ids for c in first]
    sync.publish(iter(weights(0).items()), version=9)
    assert [c.token_ids for c in engine.generate(REQUESTS, OPTIONS)] == [c.token_ids for c in first]


@pytest.mark.parametrize(("damage", "named"), [("bit", NAME), ("swap", NAME.replace("up_", "gate_"))])
def test_damage_on_the_way_names_the_first_tensor_and_leaves_the_old_weights(damage: str, named: str) -> None:
    engine, sync = make(DamagingEngine)
    sync.publish(weights(0).items(), version=0)
    before = engine.generate(REQUESTS, OPTIONS)
    engine.damage = damage  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match=rf"tensor '{named}' was sent with checksum 0x[0-9a-f]{{16}} but"):
        sync.publish(weights(1).items(), version=1)
    assert engine.policy_version == 0
    assert engine.generate(REQUESTS, OPTIONS) == before
    with pytest.raises(RuntimeError, match="no weights were received"):
        engine.commit_weights(1)
    engine.damage = ""  # type: ignore[attr-defined]
    sync.publish(weights(1).items(), version=1)
    assert engine.policy_version == 1


def test_a_stream_that_breaks_half_way_leaves_the_old_weights() -> None:
    def broken() -> Iterator[tuple[str, Tensor]]:
        yield from list(weights(1).items())[:3]
        raise ConnectionError("the exporter is gone")

    engine, sync = make()
    sync.publish(weights(0).items(), version=0)
    before = engine.generate(REQUESTS, OPTIONS)
    with pytest.raises(ConnectionError, match="exporter is gone"):
        sync.publish(broken(), version=1)
    assert engine.generate(REQUESTS, OPTIONS) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda named: named.pop(NAME), rf"lacks 1 of \d+ tensors, first '{NAME}'"),
        (lambda named: named.update({NAME: named[NAME][1:]}), rf"'{NAME}' has shape"),
        (lambda named: named.update({"extra": named[NAME]}), "'extra' is not a parameter"),
    ],
)
def test_a_refused_tensor_leaves_the_old_weights(change: object, message: str) -> None:
    engine, sync = make()
    sync.publish(weights(0).items(), version=0)
    before = engine.generate(REQUESTS, OPTIONS)
    named = weights(1)
    change(named)  # type: ignore[operator]
    with pytest.raises(ValueError, match=message):
        sync.publish(named.items(), version=1)
    assert engine.generate(REQUESTS, OPTIONS) == before


class ForgetfulEngine(EmbeddedEngine):
    """Commits, but reports what it is told to report."""

    def __init__(self, version: int, held: dict[str, int] | None = None) -> None:
        self._policy_version = version
        self.held = held
        self.committed = False

    def receive_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
        received = {name: tensor_checksum(tensor) for name, tensor in tensors}
        return received if self.held is None else self.held

    def commit_weights(self, version: int) -> None:
        self.committed = True

    def discard_weights(self) -> None: ...


def test_an_engine_that_reports_another_version_is_an_error() -> None:
    sync = InProcessSync(ForgetfulEngine(version=4), fp8=False)
    with pytest.raises(RuntimeError, match="reports policy version 4 after version 5"):
        sync.publish([("w", torch.ones(2))], version=5)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({}, "tensor 'w' was sent .* holds nothing"),
        ({"w": tensor_checksum(torch.ones(2)), "v": 1}, "tensor 'v', which was never sent"),
    ],
)
def test_tensors_that_are_missing_or_invented_are_errors(held: dict[str, int], message: str) -> None:
    engine = ForgetfulEngine(version=5, held=held)
    with pytest.raises(RuntimeError, match=message):
        InProcessSync(engine, fp8=False).publish([("w", torch.ones(2))], version=5)
    assert not engine.committed

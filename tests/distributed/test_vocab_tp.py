"""Log-probability and entropy over a sharded vocabulary: TP 1, 2 and 4 over gloo against the float64 reference."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from aer_megatron.algo.entropy import logprob_entropy, logprob_entropy_gradient
from aer_megatron.parallel.fused_head import fused_linear_logprob_entropy
from aer_megatron.parallel.vocab import vocab_parallel_logprob_entropy
from tests.support import vocab_mutants as mutants
from tests.support.spawn import run_distributed

PADDED = 96  # columns of all shards: 96, 48 or 24 per rank
HIDDEN = 8


@dataclass(frozen=True)
class Setup:
    """`vocab_size` 90 ends inside the last shard; 40 leaves whole shards of TP 4 empty."""

    dtype: torch.dtype
    vocab_size: int
    temperature: float
    tokens: int = 37

    @property
    def options(self) -> dict[str, Any]:
        return {"vocab_size": self.vocab_size, "temperature": self.temperature}

    def data(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Returns hidden states, head, logits, labels and the two per-token gradients."""
        generator = torch.Generator().manual_seed(11)
        hidden = torch.randn(self.tokens, HIDDEN, generator=generator).to(self.dtype)
        head = torch.randn(PADDED, HIDDEN, generator=generator).to(self.dtype)
        logits = (hidden.double() @ head.double().t()).to(self.dtype)
        logits[::5, 1::3] = -torch.inf
        labels = torch.randint(0, self.vocab_size, (self.tokens,), generator=generator)
        labels[::5] = 0
        return hidden, head, logits, labels, torch.randn(2, self.tokens, generator=generator)


SETUPS = [
    Setup(torch.float32, 96, 1.0),
    Setup(torch.float32, 90, 0.7),
    Setup(torch.float64, 40, 1.3),
    Setup(torch.bfloat16, 90, 1.0),
    Setup(torch.float32, 90, 1.0, tokens=0),
]


class CollectiveCounter(TorchDispatchMode):
    """Names every collective that runs inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def _shard(tensor: Tensor, rank: int, world_size: int, dim: int) -> Tensor:
    return tensor.chunk(world_size, dim=dim)[rank].clone()


def _unfused(setup: Setup, rank: int, world_size: int, **options: Any) -> dict[str, Any]:
    _, _, logits, labels, grads = setup.data()
    leaf = _shard(logits, rank, world_size, 1).requires_grad_()
    with CollectiveCounter() as forward:
        result = vocab_parallel_logprob_entropy(leaf.view_as(leaf), labels, **setup.options, **options)
    with CollectiveCounter() as backward:
        loss = (result.logprob_T * grads[0] + result.entropy_T * grads[1]).sum()
        (gradient,) = torch.autograd.grad(loss, leaf)
    values = [None if value is None else value.detach() for value in result]
    return {"values": values, "gradient": gradient, "forward": forward.names, "backward": backward.names}


def _fused(setup: Setup, rank: int, world_size: int, group: Any) -> dict[str, Any]:
    hidden, head, _, labels, grads = setup.data()
    hidden.requires_grad_()
    weight = _shard(head, rank, world_size, 0).requires_grad_()
    with CollectiveCounter() as forward:
        result = fused_linear_logprob_entropy(hidden, weight, labels, tp_group=group, chunk_tokens=10, **setup.options)
    with CollectiveCounter() as backward:
        (result.logprob_T * grads[0] + result.entropy_T * grads[1]).sum().backward()
    return {
        "values": [result.logprob_T.detach(), result.entropy_T.detach()],
        "hidden": hidden.grad,
        "weight": weight.grad,
        "forward": forward.names,
        "backward": backward.names,
    }


def _sequence_parallel(setup: Setup, rank: int, world_size: int, group: Any) -> Tensor:
    """Returns the gradient of this rank's quarter or half of the hidden states, behind Megatron's gather."""
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    hidden, head, _, labels, grads = setup.data()
    rows = setup.tokens - setup.tokens % world_size
    part = _shard(hidden[:rows], rank, world_size, 0).requires_grad_()
    gathered = gather_from_sequence_parallel_region(part, tensor_parallel_output_grad=False, group=group)
    result = fused_linear_logprob_entropy(
        gathered, _shard(head, rank, world_size, 0), labels[:rows], tp_group=group, **setup.options
    )
    (result.logprob_T * grads[0, :rows] + result.entropy_T * grads[1, :rows]).sum().backward()
    assert part.grad is not None
    return part.grad


def _mutants(setup: Setup, rank: int, world_size: int) -> dict[str, Any]:
    _, _, logits, labels, grads = setup.data()
    leaf = _shard(logits, rank, world_size, 1).requires_grad_()
    logprob, entropy = mutants.gradient_only_on_owner(
        leaf, labels, tp_group=dist.group.WORLD, vocab_size=PADDED, temperature=setup.temperature
    )
    (gradient,) = torch.autograd.grad((logprob * grads[0] + entropy * grads[1]).sum(), leaf)
    whole = mutants.none_means_world(logits, labels, vocab_size=PADDED)[1]
    return {"owner_only": gradient, "none_means_world": whole}


def _worker(rank: int, world_size: int) -> dict[str, Any]:
    from aer_megatron.parallel.platform import install_platform

    install_platform()  # Megatron's gather allocates on the current device
    group = dist.group.WORLD
    outcome: dict[str, Any] = {
        "unfused": [
            _unfused(setup, rank, world_size, tp_group=group, chunk_tokens=8, with_statistics=True) for setup in SETUPS
        ],
        "fused": [_fused(setup, rank, world_size, group) for setup in SETUPS],
        "whole": _unfused(SETUPS[0], 0, 1),  # tp_group=None, though a world exists
        "sequence_parallel": _sequence_parallel(SETUPS[1], rank, world_size, group),
    }
    if world_size > 1:
        outcome["mutants"] = _mutants(SETUPS[0], rank, world_size)
    return outcome


@functools.cache
def _outcomes(world_size: int) -> list[dict[str, Any]]:
    """Returns what every rank computed; cached, because pytest sets a parametrized fixture up more than once."""
    return run_distributed(_worker, world_size, timeout_s=400)


@pytest.fixture(params=[1, 2, 4])
def outcomes(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return _outcomes(request.param)


def _bar(dtype: torch.dtype, values: bool) -> float:
    if dtype == torch.float64:
        return 1e-12
    if dtype == torch.bfloat16:
        return 2e-5 if values else 4e-3  # bfloat16 gradients overwrite bfloat16 logits: 2^-9
    return 2e-5 if values else 1e-6


def _relative(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("index", range(4))
def test_unfused_values_and_gradient_equal_the_reference(outcomes: list[dict[str, Any]], index: int) -> None:
    setup = SETUPS[index]
    _, _, logits, labels, grads = setup.data()
    wanted = logprob_entropy(logits, labels, **setup.options)
    gradient = logprob_entropy_gradient(logits, labels, *grads, **setup.options)
    for outcome in outcomes:
        for got, value in zip(outcome["unfused"][index]["values"], wanted, strict=True):
            assert float((got - value).abs().max()) <= _bar(setup.dtype, values=True)
    got_gradient = torch.cat([outcome["unfused"][index]["gradient"] for outcome in outcomes], dim=1)
    assert _relative(got_gradient, gradient) <= _bar(setup.dtype, values=False)


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("form", ["unfused", "fused"])
def test_every_rank_has_bitwise_the_same_values(outcomes: list[dict[str, Any]], form: str, index: int) -> None:
    first = outcomes[0][form][index]["values"]
    for outcome in outcomes[1:]:
        for one, two in zip(first, outcome[form][index]["values"], strict=True):
            assert torch.equal(one, two)


def test_one_collective_forward_and_none_backward(outcomes: list[dict[str, Any]]) -> None:
    gather = ["_allgather_base_"] if len(outcomes) > 1 else []
    for outcome in outcomes:
        for setup, record in zip(SETUPS, outcome["unfused"], strict=True):
            assert record["forward"] == (gather if setup.tokens else [])
            assert record["backward"] == []


def test_fused_head_has_one_more_collective_for_the_hidden_gradient(outcomes: list[dict[str, Any]]) -> None:
    gather, reduce = (["_allgather_base_"], ["allreduce_"]) if len(outcomes) > 1 else ([], [])
    for outcome in outcomes:
        for setup, record in zip(SETUPS, outcome["fused"], strict=True):
            assert record["forward"] == (gather if setup.tokens else [])
            assert record["backward"] == (reduce if setup.tokens else [])


def _whole_head_gradients(setup: Setup, rows: int) -> tuple[Tensor, Tensor]:
    hidden, head, _, labels, grads = setup.data()
    logits = hidden[:rows].double() @ head.double().t()
    gradient = logprob_entropy_gradient(logits, labels[:rows], *grads[:, :rows], **setup.options)
    return gradient @ head.double(), gradient.t() @ hidden[:rows].double()


@pytest.mark.parametrize("index", range(4))
def test_fused_gradients_equal_the_reference(outcomes: list[dict[str, Any]], index: int) -> None:
    """The hidden gradient is complete on every rank; bfloat16 rounds logits, hidden and weight gradients."""
    setup = SETUPS[index]
    bar = 2e-2 if setup.dtype == torch.bfloat16 else 2 * _bar(setup.dtype, values=False)
    wanted_hidden, wanted_weight = _whole_head_gradients(setup, setup.tokens)
    for outcome in outcomes:
        assert _relative(outcome["fused"][index]["hidden"], wanted_hidden) <= bar
        assert torch.equal(outcome["fused"][index]["hidden"], outcomes[0]["fused"][index]["hidden"])
    weight = torch.cat([outcome["fused"][index]["weight"] for outcome in outcomes])
    assert _relative(weight, wanted_weight) <= bar


def test_hidden_gradient_behind_a_sequence_parallel_gather(outcomes: list[dict[str, Any]]) -> None:
    rows = SETUPS[1].tokens - SETUPS[1].tokens % len(outcomes)
    wanted, _ = _whole_head_gradients(SETUPS[1], rows)
    got = torch.cat([outcome["sequence_parallel"] for outcome in outcomes])
    assert _relative(got, wanted) <= 2e-6


def test_no_group_means_whole_and_never_the_world(outcomes: list[dict[str, Any]]) -> None:
    _, _, logits, labels, _ = SETUPS[0].data()
    wanted = logprob_entropy(logits, labels, **SETUPS[0].options).entropy_T
    for outcome in outcomes:
        assert outcome["whole"]["forward"] == outcome["whole"]["backward"] == []
        assert float((outcome["whole"]["values"][1] - wanted).abs().max()) <= 2e-5
        if len(outcomes) > 1:  # the wrong form sees the vocabulary twice
            wrong = outcome["mutants"]["none_means_world"]
            assert float((wrong - wanted).abs().max()) > 0.5


def test_shards_without_the_label_have_their_part_of_the_gradient(outcomes: list[dict[str, Any]]) -> None:
    _, _, logits, labels, grads = SETUPS[0].data()
    wanted = logprob_entropy_gradient(logits, labels, *grads, **SETUPS[0].options)
    right = torch.cat([outcome["unfused"][0]["gradient"] for outcome in outcomes], dim=1)
    assert _relative(right, wanted) <= 1e-6
    if len(outcomes) > 1:  # one shard alone owns every label
        wrong = torch.cat([outcome["mutants"]["owner_only"] for outcome in outcomes], dim=1)
        assert _relative(wrong, wanted) > 0.1

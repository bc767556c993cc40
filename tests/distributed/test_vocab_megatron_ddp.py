"""The fused head's weight gradient under Megatron-Core's DistributedDataParallel: nothing lost, nothing twice."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.spawn import run_distributed

TOKENS, HIDDEN, VOCAB, MICRO_BATCHES = 12, 8, 20, 2
CASES = list(itertools.product([False, True], [False, True]))  # tied, overlap_grad_reduce


class TinyModel(torch.nn.Module):
    """Embedding, one linear layer and a head, which may share the embedding's weight."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = torch.nn.Parameter(torch.randn(VOCAB, HIDDEN, generator=generator))
        self.middle = torch.nn.Parameter(torch.randn(HIDDEN, HIDDEN, generator=generator))
        head = self.embedding if tied else torch.nn.Parameter(torch.randn(VOCAB, HIDDEN, generator=generator))
        self.head = head

    def forward(self, tokens: Tensor, labels: Tensor, fused: bool) -> Tensor:
        from aer_megatron.parallel.fused_head import fused_linear_logprob_entropy
        from aer_megatron.parallel.vocab import vocab_parallel_logprob_entropy

        hidden = torch.nn.functional.embedding(tokens, self.embedding) @ self.middle
        if fused:
            result = fused_linear_logprob_entropy(hidden, self.head, labels)
        else:
            result = vocab_parallel_logprob_entropy(hidden @ self.head.t(), labels)
        return (result.logprob_T - 0.3 * result.entropy_T).sum()


def _main_grads(tied: bool, overlap: bool, mark_tied: bool, fused: bool, set_flag: bool = False) -> dict[str, Tensor]:
    """Returns main_grad of every parameter after two micro-batches; `set_flag` imitates Megatron's own fused head."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer import TransformerConfig

    model = TinyModel(tied)
    if mark_tied:
        model.embedding.zero_out_wgrad = True  # type: ignore[attr-defined]  # as Megatron's GPTModel does
    ddp = DistributedDataParallel(
        config=TransformerConfig(num_layers=1, hidden_size=HIDDEN, num_attention_heads=1),
        ddp_config=DistributedDataParallelConfig(overlap_grad_reduce=overlap, grad_reduce_in_fp32=True),
        module=model,
    )
    ddp.zero_grad_buffer()
    if set_flag:
        model.head.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(1)
    for micro_batch in range(MICRO_BATCHES):
        tokens, labels = torch.randint(0, VOCAB, (2, TOKENS), generator=generator)
        if micro_batch < MICRO_BATCHES - 1:
            with ddp.no_sync():
                ddp(tokens, labels, fused).backward()
        else:
            ddp(tokens, labels, fused).backward()
    ddp.finish_grad_sync()
    for parameter in model.parameters():
        assert parameter.grad is None
    return {name: parameter.main_grad.clone() for name, parameter in model.named_parameters()}


def _worker(rank: int, world_size: int) -> dict[Any, Any]:
    from aer_megatron.parallel.platform import install_platform
    from aer_megatron.parallel.topology import initialize_topology

    install_platform()
    initialize_topology(tp=1, pp=1, seed=1)
    flagged = {"flagged": [_main_grads(True, False, False, False), _main_grads(True, False, False, True, True)]}
    return flagged | {
        (tied, overlap, mark): [_main_grads(tied, overlap, mark, fused) for fused in (False, True)]
        for tied, overlap in CASES
        for mark in ([False, True] if tied else [False])
    }


@pytest.fixture(scope="module")
def gradients() -> dict[Any, Any]:
    outcome: dict[Any, Any] = run_distributed(_worker, 1, timeout_s=400)[0]
    return outcome


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("tied", "mark"), [(False, False), (True, False), (True, True)])
def test_main_grad_equals_the_unfused_form(gradients: dict[Any, Any], tied: bool, mark: bool, overlap: bool) -> None:
    """Tied, with and without Megatron's `zero_out_wgrad` mark: the embedding's gradient comes by autograd."""
    unfused, fused = gradients[tied, overlap, mark]
    assert set(unfused) == ({"embedding", "middle"} if tied else {"embedding", "middle", "head"})
    for name, wanted in unfused.items():
        assert float(wanted.norm()) > 0
        assert float((fused[name] - wanted).norm() / wanted.norm()) <= 1e-6


def test_setting_the_flag_would_lose_a_tied_embeddings_gradient(gradients: dict[Any, Any]) -> None:
    """Why `grad_added_to_main_grad` is left alone: with it, DDP's hook drops what arrives by autograd."""
    right, wrong = gradients["flagged"]
    assert float((wrong["embedding"] - right["embedding"]).norm() / right["embedding"].norm()) > 0.1

"""Wrong forms of log-probability and entropy, each seen in public code; a test must fail on every one.

Every form takes (logits, labels, *, tp_group, vocab_size, temperature) and returns (logprob, entropy).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from aer_megatron.algo.entropy import logprob_entropy, logprob_entropy_gradient

Group = dist.ProcessGroup | None


def _from_log_probabilities(logp: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    entropy = -torch.where(logp.exp() > 0, logp.exp() * logp, 0.0).sum(-1)
    return logp.gather(1, labels[:, None]).squeeze(1), entropy


def float_alias(
    logits: Tensor, labels: Tensor, *, tp_group: Group = None, vocab_size: int, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`.float()` of a float32 tensor is the tensor itself: shifting "the copy" destroys the caller's logits."""
    with torch.no_grad():
        shifted = logits.float()
        shifted -= shifted.amax(-1, keepdim=True)
    return _from_log_probabilities(torch.log_softmax(shifted[:, :vocab_size] / temperature, -1), labels)


def nan_from_minus_inf(
    logits: Tensor, labels: Tensor, *, tp_group: Group = None, vocab_size: int, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """p log p without a guard is 0 * -inf = NaN where a logit is -inf."""
    logp = torch.log_softmax(logits[:, :vocab_size].float() / temperature, -1)
    return logp.gather(1, labels[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)


def padding_counted(
    logits: Tensor, labels: Tensor, *, tp_group: Group = None, vocab_size: int, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Padding columns take part, so that the entropy depends on how much padding the TP size asks for."""
    return _from_log_probabilities(torch.log_softmax(logits.float() / temperature, -1), labels)


def temperature_copy(
    logits: Tensor, labels: Tensor, *, tp_group: Group = None, vocab_size: int, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Dividing by the temperature first costs a full copy of the logits."""
    from aer_megatron.parallel.vocab import vocab_parallel_logprob_entropy

    return vocab_parallel_logprob_entropy(logits / temperature, labels, vocab_size=vocab_size)[:2]


def reduced_precision_product(
    logits: Tensor, labels: Tensor, *, tp_group: Group = None, vocab_size: int, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """sum p log p as an einsum: TF32 tensor cores keep 10 bits of each factor (imitated here by rounding)."""
    logp = torch.log_softmax(logits[:, :vocab_size].float() / temperature, -1)

    def tf32(x: Tensor) -> Tensor:
        bits = x.detach().contiguous().view(torch.int32)
        return ((bits + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)

    return logp.gather(1, labels[:, None]).squeeze(1), -torch.einsum("tv,tv->t", tf32(logp.exp()), tf32(logp))


def bfloat16_reductions(
    logits: Tensor, labels: Tensor, *, tp_group: Group = None, vocab_size: int, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Entropy computed in the logits' own bfloat16."""
    logp = torch.log_softmax(logits[:, :vocab_size] / temperature, -1)
    return logp.gather(1, labels[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)


def none_means_world(
    logits: Tensor, labels: Tensor, *, tp_group: Group = None, vocab_size: int, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """torch.distributed's own reading of group=None: everybody."""
    from aer_megatron.parallel.vocab import vocab_parallel_logprob_entropy

    group = dist.group.WORLD if tp_group is None else tp_group
    return vocab_parallel_logprob_entropy(logits, labels, tp_group=group, temperature=temperature)[:2]


class _SilentlyDestructive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, vocab_size: int, temperature: float) -> Any:
        ctx.save_for_backward(logits, labels)
        ctx.options = {"vocab_size": vocab_size, "temperature": temperature}
        result = logprob_entropy(logits, labels, **ctx.options)
        return result.logprob_T.to(logits.dtype), result.entropy_T.to(logits.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        logits, labels = ctx.saved_tensors
        gradient = logprob_entropy_gradient(logits, labels, *grads, **ctx.options)
        logits.data.copy_(gradient)  # `.data` leaves the version counter alone
        return logits.detach().clone(), None, None, None


def destructive_without_version_bump(
    logits: Tensor, labels: Tensor, *, tp_group: Group = None, vocab_size: int, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The backward pass overwrites the logits behind autograd's back, any number of times."""
    return _SilentlyDestructive.apply(logits, labels, vocab_size, temperature)


class _OwnerOnlyGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, tp_group: Group, temperature: float) -> Any:
        shards = [torch.empty_like(logits) for _ in range(dist.get_world_size(tp_group))]
        dist.all_gather(shards, logits.contiguous(), group=tp_group)
        whole = torch.cat(shards, dim=1)
        ctx.save_for_backward(whole, labels)
        ctx.place = (dist.get_rank(tp_group) * logits.shape[1], logits.shape[1])
        ctx.options = {"vocab_size": whole.shape[1], "temperature": temperature}
        result = logprob_entropy(whole, labels, **ctx.options)
        return result.logprob_T.to(logits.dtype), result.entropy_T.to(logits.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        whole, labels = ctx.saved_tensors
        start, width = ctx.place
        gradient = logprob_entropy_gradient(whole, labels, *grads, **ctx.options)[:, start : start + width]
        owned = (labels >= start) & (labels < start + width)
        return (gradient * owned[:, None]).to(whole.dtype), None, None, None


def gradient_only_on_owner(
    logits: Tensor, labels: Tensor, *, tp_group: Group = None, vocab_size: int, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Shards that do not own the label return no gradient for the row, though -p g_logp belongs there."""
    return _OwnerOnlyGradient.apply(logits, labels, tp_group, temperature)


def top_k_per_micro_batch(entropy: Tensor, count: int, micro_batches: int) -> Tensor:
    """Returns the mask of the `count` highest entropies, wrongly chosen micro-batch by micro-batch."""
    masks = []
    for part in entropy.chunk(micro_batches):
        mask = torch.zeros_like(part, dtype=torch.bool)
        masks.append(mask.index_fill(0, part.topk(count // micro_batches).indices, True))
    return torch.cat(masks)

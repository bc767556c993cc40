"""Batched autoregressive decoding with a KV cache: one batch of requests in, token ids out.

Prompts are left-padded, so that all sequences write the same cache slot at a step; positions and masks leave
the padding out exactly. Equal prompts share their prefill. Finished sequences leave the batch once they are a
quarter of it: copying the cache costs about as much as one attention pass over it, and a geometric rule
copies each entry only a bounded number of times.

Shape suffixes: U unique prompts, B sequences in the batch (shrinks as they finish), S prompt slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from aer_megatron.rollout.engine import GenerateRequest, SamplingOptions
from aer_megatron.rollout.sampling import sample_tokens
from aer_megatron.rollout.seeds import uniform_B
from aer_megatron.types import FinishReason, Float32Array, Int64Array

_COMPACT_FRACTION = 4  # finished sequences leave once they are 1 / _COMPACT_FRACTION of the batch


class DecodedSequence(NamedTuple):
    """The sampled ids of one request with their log-probabilities (nats) and why it ended."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason


class _Recorder:
    """What has been sampled so far, by request; all live sequences have the same number of tokens."""

    def __init__(self, requests: Sequence[GenerateRequest], stop_token_ids: frozenset[int]) -> None:
        self.limit = np.array([request.max_new_tokens for request in requests], dtype=np.int64)
        self.seed = np.array([request.seed for request in requests], dtype=np.uint64)
        self.row = np.arange(len(requests))  # request of each batch row
        self.live = np.ones(len(requests), dtype=bool)  # by batch row
        self.length = np.zeros(len(requests), dtype=np.int64)
        self.stopped = np.zeros(len(requests), dtype=bool)
        self._stop = np.array(sorted(stop_token_ids), dtype=np.int64)
        self._tokens: list[tuple[NDArray[np.intp], Int64Array]] = []
        self._logprobs: list[Float32Array] = []

    def add(self, tokens_B: Int64Array, logprobs_B: Float32Array) -> None:
        """Takes the tokens of one step and marks the rows that end with it."""
        self._tokens.append((self.row, tokens_B))
        self._logprobs.append(logprobs_B)
        length = len(self._tokens)
        stopped_B = np.isin(tokens_B, self._stop) & self.live
        ended_B = (stopped_B | (self.limit[self.row] == length)) & self.live
        self.length[self.row[ended_B]] = length
        self.stopped[self.row[stopped_B]] = True
        self.live &= ~ended_B

    def compact(self) -> NDArray[np.intp] | None:
        """Returns the batch rows to keep if it pays to drop the others, else None."""
        finished = self.live.size - int(self.live.sum())
        if finished * _COMPACT_FRACTION < self.live.size or not finished:
            return None
        keep = np.flatnonzero(self.live)
        self.row = self.row[keep]
        self.live = self.live[keep]
        return keep

    def results(self) -> list[DecodedSequence]:
        shape = (self.length.size, len(self._tokens))
        tokens = np.zeros(shape, dtype=np.int64)
        logprobs = np.zeros(shape, dtype=np.float32)
        for step, ((row, tokens_B), logprobs_B) in enumerate(zip(self._tokens, self._logprobs, strict=True)):
            tokens[row, step] = tokens_B
            logprobs[row, step] = logprobs_B
        return [
            DecodedSequence(
                tuple(tokens[i, :length].tolist()),
                tuple(logprobs[i, :length].tolist()),
                "stop" if self.stopped[i] else "length",
            )
            for i, length in enumerate(self.length.tolist())
        ]


@torch.inference_mode()
def decode_batch(
    model: Any, requests: Sequence[GenerateRequest], options: SamplingOptions, *, max_positions: int | None
) -> list[DecodedSequence]:
    """Returns one decoded sequence per request, in order.

    Args:
        model: a transformers causal language model with full attention, in evaluation mode.
        requests: at least one; they run as one batch.
        options: see ``SamplingOptions``.
        max_positions: positions the model was built for; rows that have finished do not run past it.

    Raises:
        RuntimeError: non-finite logits.
    """
    device = model.device
    # every distinct prompt runs once; its keys and values are then copied to the rows that share it
    prompt_of_B, prompts = _unique_prompts(requests)
    cache = DynamicCache()
    logits_UV, pad_U = _prefill(model, prompts, cache)
    expand = torch.from_numpy(prompt_of_B).to(device)
    logits, pad = logits_UV, pad_U
    if len(prompts) < len(requests):
        cache.batch_select_indices(expand)
        logits, pad = logits_UV[expand], pad_U[expand]
    # slots are counted from the left edge of the longest prompt: shorter ones have padding, masked for good
    prompt_slots = max(len(prompt) for prompt in prompts)
    num_slots = prompt_slots + max(request.max_new_tokens for request in requests)
    mask = _additive(torch.arange(num_slots, device=device) >= pad[:, None], model.dtype)[:, None, None, :]
    # one token per row and turn; rows that ended are dropped once they are many
    recorder = _Recorder(requests, options.stop_token_ids)
    step = 0
    while True:
        uniform = torch.from_numpy(uniform_B(recorder.seed[recorder.row], step)).to(device)
        tokens, logprobs = sample_tokens(logits, uniform, options)
        recorder.add(tokens.cpu().numpy(), logprobs.cpu().numpy())
        if not recorder.live.any():
            return recorder.results()
        keep = recorder.compact()
        if keep is not None:
            index = torch.from_numpy(keep).to(device)
            cache.batch_select_indices(index)
            tokens, pad, mask = tokens[index], pad[index], mask[index]
        slot = prompt_slots + step
        position = slot - pad
        if max_positions is not None:
            position = position.clamp(max=max_positions - 1)
        logits = _forward(model, tokens[:, None], position[:, None], mask[..., : slot + 1], cache)
        step += 1


def _unique_prompts(requests: Sequence[GenerateRequest]) -> tuple[NDArray[np.int64], list[tuple[int, ...]]]:
    index: dict[tuple[int, ...], int] = {}
    prompt_of_B = [index.setdefault(request.prompt_ids, len(index)) for request in requests]
    return np.array(prompt_of_B, dtype=np.int64), list(index)


def _prefill(model: Any, prompts: Sequence[tuple[int, ...]], cache: DynamicCache) -> tuple[Tensor, Tensor]:
    """Returns the logits after each prompt [U, V] and its padding slots, int64 [U]; fills the cache."""
    num_slots = max(len(prompt) for prompt in prompts)
    ids_US = torch.zeros(len(prompts), num_slots, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids_US[row, num_slots - len(prompt) :] = torch.tensor(prompt)
    pad_U = torch.tensor([num_slots - len(prompt) for prompt in prompts], device=model.device)
    slot = torch.arange(num_slots, device=model.device)
    real_US = slot >= pad_U[:, None]
    causal_SS = slot[:, None] >= slot
    # A padding query sees itself: a row without any key would make its softmax NaN.
    visible_USS = (causal_SS & real_US[:, None, :]) | (slot[:, None] == slot)
    position_US = (slot - pad_U[:, None]).clamp(min=0)
    mask = _additive(visible_USS, model.dtype)[:, None]
    return _forward(model, ids_US.to(model.device), position_US, mask, cache), pad_U


def _forward(model: Any, ids_BS: Tensor, position_BS: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
    logits: Tensor = model(
        input_ids=ids_BS,
        position_ids=position_BS,
        attention_mask=mask,  # four dimensions: transformers uses it as it is and builds none of its own
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits
    return logits[:, -1]


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)

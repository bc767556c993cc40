"""The engine that needs no server: generation in the trainer's own process with a transformers model.

The model is built from a Hugging Face configuration; its weights arrive in Hugging Face names from the stream that
also feeds servers. They are kept beside the old ones and swapped in whole, so a failed update leaves the old policy
in service (memory: twice the model during an update, once otherwise).

This file does NOT read weights from disk and knows nothing of ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from aer_megatron.convert.transformers_modules import checkpoint_views
from aer_megatron.rollout.checksum import tensor_checksum
from aer_megatron.rollout.decode import decode_batch
from aer_megatron.rollout.engine import GenerateRequest, SamplingOptions
from aer_megatron.types import Completion, VersionSpan


class EmbeddedEngine:
    """A ``RolloutEngine`` in this process; see ``rollout/engine.py`` for the contract.

    A completion is a function of its request, the options and the weights: batch neighbours and their order
    change it only through the rounding of the logits.

    Args:
        hf_config: configuration of a causal language model with full attention; it is copied.
        dtype: of the weights and activations; log-probabilities are fp32 in any case.
        device: where the model lives.
        max_batch_size: sequences decoded together.

    Raises:
        ValueError: the configuration has layers other than full attention, or ``max_batch_size`` < 1.
    """

    def __init__(
        self, hf_config: PretrainedConfig, *, dtype: torch.dtype, device: torch.device, max_batch_size: int
    ) -> None:
        if max_batch_size < 1:
            raise ValueError(f"rollout.max_batch_size={max_batch_size} must be at least 1; raise it")
        _require_full_attention(hf_config)
        self._max_batch_size = max_batch_size
        self._model: Any = _build_model(hf_config, dtype, device)
        self._parameters, self._aliases = _parameters_and_aliases(self._model)
        self._owners = {
            tensor: name for name, parameter in self._parameters.items() for tensor in checkpoint_views(name, parameter)
        }
        self._max_positions: int | None = getattr(hf_config, "max_position_embeddings", None)
        self._vocab_size: int = hf_config.vocab_size
        self._received: dict[str, Tensor] | None = None
        self._policy_version = -1

    @property
    def policy_version(self) -> int:
        """Returns the version of the weights in use; -1 before the first update."""
        return self._policy_version

    def generate(self, requests: Sequence[GenerateRequest], options: SamplingOptions) -> list[Completion]:
        """Returns one completion per request, in order, each with one version span.

        Raises:
            ValueError: a token id outside the vocabulary, or a request longer than the model's positions.
            RuntimeError: no weights yet, closed, or non-finite logits.
        """
        if self._model is None:
            raise RuntimeError("the embedded engine is closed; make a new one")
        if self._policy_version < 0:
            raise RuntimeError("the embedded engine has no weights yet; publish some first")
        self._check(requests, options)
        # Similar lengths waste few slots on padding; equal prompts side by side share a prefill.
        prompts = [request.prompt_ids for request in requests]
        order = sorted(range(len(requests)), key=lambda i: (len(prompts[i]), prompts[i]))
        completions: dict[int, Completion] = {}
        for start in range(0, len(order), self._max_batch_size):
            batch = order[start : start + self._max_batch_size]
            decoded = decode_batch(
                self._model, [requests[i] for i in batch], options, max_positions=self._max_positions
            )
            for i, (token_ids, logprobs, reason) in zip(batch, decoded, strict=True):
                span = VersionSpan(self._policy_version, 0, len(token_ids))
                completions[i] = Completion(token_ids, logprobs, reason, (span,))
        return [completions[i] for i in range(len(requests))]

    def receive_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
        """Copies new weights beside those in use, and returns the checksum of every copy by name.

        A tied output matrix may be left out.

        Raises:
            ValueError: an unknown, missing or repeated name, another shape or dtype, or a tied output matrix
                that differs from the embedding. Nothing is kept.
            RuntimeError: the engine is closed.
        """
        if self._model is None:
            raise RuntimeError("the embedded engine is closed; make a new one")
        self._received = None
        received: dict[str, Tensor] = {}  # whole parameters
        views: dict[str, Tensor] = {}  # of them, by the name under which each part arrives
        checksums: dict[str, int] = {}
        # copies into room of their own: what is in use stays whole until all is there
        for name, tensor in tensors:
            first_name = self._aliases.get(name, name)
            owner = self._owner(first_name)
            if owner not in received:
                received[owner] = torch.empty_like(self._parameters[owner], requires_grad=False)
                views |= checkpoint_views(owner, received[owner])
            target = views[first_name]
            _check_tensor(name, tensor, target, repeated=name in checksums)
            if name in self._aliases:
                checksums[name] = tensor_checksum(tensor)
                continue
            target.copy_(tensor.detach())
            checksums[name] = tensor_checksum(target)
        missing = [name for name in self._owners if name not in checksums]
        if missing:
            raise ValueError(
                f"weight update lacks {len(missing)} of {len(self._owners)} tensors, first "
                f"{missing[0]!r}; send every parameter of the model"
            )
        for alias, name in self._aliases.items():
            if alias in checksums and checksums[alias] != checksums[name]:
                raise ValueError(
                    f"weight {alias!r} differs from {name!r}, but the configuration ties them; send "
                    f"equal tensors or set tie_word_embeddings to false"
                )
        self._received = received
        return checksums

    def commit_weights(self, version: int) -> None:
        """Puts the received weights into service as policy ``version``.

        Raises:
            ValueError: a negative version.
            RuntimeError: nothing was received.
        """
        if version < 0:
            raise ValueError(f"policy version {version} must not be negative; count from 0")
        if self._received is None:
            raise RuntimeError("no weights were received; call receive_weights first")
        for name, tensor in self._received.items():
            self._parameters[name].data = tensor
        self._received = None
        self._policy_version = version

    def discard_weights(self) -> None:
        """Drops received weights that are not in service."""
        self._received = None

    def held_checksums(self) -> dict[str, int]:
        """Returns the checksum of every tensor in service by name, read from the model; tied ones under their first."""
        return {
            tensor: tensor_checksum(view)
            for name, parameter in self._parameters.items()
            for tensor, view in checkpoint_views(name, parameter.detach()).items()
        }

    def close(self) -> None:
        """Releases the model; calling it twice is harmless."""
        self._model = None
        self._parameters = {}
        self._received = None

    def _check(self, requests: Sequence[GenerateRequest], options: SamplingOptions) -> None:
        outside = [token for token in options.stop_token_ids if not 0 <= token < self._vocab_size]
        if outside:
            raise ValueError(f"stop token {outside[0]} must lie in the vocabulary 0..{self._vocab_size - 1}; drop it")
        for index, request in enumerate(requests):
            if min(request.prompt_ids) < 0 or max(request.prompt_ids) >= self._vocab_size:
                raise ValueError(
                    f"request {index}: prompt ids must lie in the vocabulary 0..{self._vocab_size - 1}, got "
                    f"{min(request.prompt_ids)}..{max(request.prompt_ids)}; use the model's own tokenizer"
                )
            length = len(request.prompt_ids) + request.max_new_tokens
            if self._max_positions is not None and length > self._max_positions:
                raise ValueError(
                    f"request {index}: {len(request.prompt_ids)} prompt tokens + rollout.max_new_tokens="
                    f"{request.max_new_tokens} must not exceed the model's {self._max_positions} positions; "
                    f"lower rollout.max_new_tokens or data.max_prompt_tokens"
                )

    def _owner(self, name: str) -> str:
        """Returns the name of the parameter that holds tensor ``name``."""
        if name not in self._owners:
            raise ValueError(f"weight {name!r} is not a parameter of the model; send Hugging Face names")
        return self._owners[name]


def _check_tensor(name: str, tensor: Tensor, target: Tensor, *, repeated: bool) -> None:
    if repeated:
        raise ValueError(f"weight {name!r} was sent twice in one update; send each tensor once")
    if tensor.shape != target.shape:
        raise ValueError(
            f"weight {name!r} has shape {tuple(tensor.shape)}, the model's is {tuple(target.shape)}; "
            f"send the unsharded tensor of this configuration"
        )
    if tensor.dtype != target.dtype:
        raise ValueError(
            f"weight {name!r} has dtype {tensor.dtype}, the engine's is {target.dtype}; build the "
            f"engine with the training dtype (model.dtype)"
        )


def _require_full_attention(hf_config: PretrainedConfig) -> None:
    kinds = set(getattr(hf_config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ValueError(
            f"the embedded engine decodes models with full attention only, this one has {sorted(kinds)}; "
            f"use another model or a server engine"
        )


def _build_model(hf_config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> Any:
    # transformers draws initial weights and may write into the configuration: keep both inside.
    build: Any = AutoModelForCausalLM.from_config
    with torch.random.fork_rng(devices=[]):
        model = build(copy.deepcopy(hf_config), dtype=dtype, attn_implementation="sdpa")
    model.requires_grad_(False)
    return model.to(device).eval()


def _parameters_and_aliases(model: torch.nn.Module) -> tuple[dict[str, torch.nn.Parameter], dict[str, str]]:
    """Returns the parameters by name, and for every second name of a tied parameter its first name."""
    parameters: dict[str, torch.nn.Parameter] = {}
    aliases: dict[str, str] = {}
    first_name: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = first_name.setdefault(id(parameter), name)
        if first == name:
            parameters[name] = parameter
        else:
            aliases[name] = first
    return parameters, aliases

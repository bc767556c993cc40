"""Logits of a converted model through Megatron-Core's own GPTModel, to hold against transformers'.

Everything runs in fp32 in one process. This file does NOT know where the checkpoints came from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from aer_megatron.actor.model import ModelOptions, gpt_arguments
from aer_megatron.actor.weights import load_hf_weights
from aer_megatron.convert.architecture import ModelArchitecture
from aer_megatron.convert.megatron_folder import MegatronFolder
from aer_megatron.parallel.topology import Topology, destroy_topology, initialize_topology

_PROMPT_LENGTH = 48
_STRIDE = 7919  # prime: visits ids all over the vocabulary


@dataclass(frozen=True, slots=True)
class LogitsDifference:
    """How far two models' logits are apart on one prompt."""

    max_abs: float
    largest: float  # magnitude of the largest logit
    num_positions: int
    num_other_argmax: int


def fixed_prompt(vocab_size: int) -> list[int]:
    """Returns the token ids that every verification uses."""
    return [(_STRIDE * (place + 1)) % vocab_size for place in range(_PROMPT_LENGTH)]


def transformers_logits(
    folder: Path, prompts: Sequence[Sequence[int]], *, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Returns [length, vocabulary] logits of each prompt from transformers' implementation, computed in ``dtype``."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        return [model(torch.tensor([prompt])).logits[0] for prompt in prompts]


def megatron_logits(
    arch: ModelArchitecture, prompts: Sequence[Sequence[int]], load: Callable[[GPTModel, Topology], None]
) -> list[Tensor]:
    """Returns fp32 [length, vocabulary] logits of each prompt from GPTModel on one rank; ``load`` brings the weights.

    The platform must be installed and no process group exist.
    """
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        topology = initialize_topology(tp=1, pp=1, seed=0)
        model = build_gpt(arch, topology)
        load(model, topology)
        with torch.no_grad():
            return [gpt_logits(model, prompt)[:, : arch.vocab_size] for prompt in prompts]
    finally:
        destroy_topology()


def build_gpt(arch: ModelArchitecture, topology: Topology) -> GPTModel:
    """Returns this rank's stage of an unmodified fp32 GPTModel, without meaningful weights."""
    # Megatron-Core has experts under tensor parallelism only with sequence parallelism
    options = ModelOptions(sequence_parallel=topology.tp > 1 and arch.moe is not None)
    return GPTModel(**gpt_arguments(arch, options, topology), parallel_output=False).eval()


def gpt_logits(model: GPTModel, prompt: Sequence[int]) -> Tensor:
    """Returns the whole model's fp32 [length, padded vocabulary] logits of one prompt."""
    tokens = torch.tensor([prompt])
    positions = torch.arange(len(prompt))[None]
    logits: Tensor = model(tokens, positions, None)[0].float()
    return logits


def load_distributed(model: GPTModel, folder: Path) -> None:
    """Fills the model from a distributed checkpoint through Megatron-Core's own loader.

    That loader unpickles ``.metadata`` with all that pickle can do, so it is given only what our own reader has passed:
    a program without globals but those of a checkpoint's tables.

    Raises ValueError for a folder that is no checkpoint; RuntimeError or Megatron's CheckpointingException where names
    or shapes do not fit.
    """
    MegatronFolder(folder)
    state = dist_checkpointing.load(model.sharded_state_dict(), str(folder))
    model.load_state_dict(state, strict=True)


def load_from_hf(arch: ModelArchitecture, get: Callable[[str], Tensor]) -> Callable[[GPTModel, Topology], None]:
    """Returns a loader of Hugging Face tensors for ``megatron_logits``."""
    return lambda model, topology: load_hf_weights(model, arch, topology, get)


def logits_difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> LogitsDifference:
    """Returns the largest difference over all prompts and positions, and where the most likely token differs."""
    pairs = list(zip(expected, found, strict=True))
    return LogitsDifference(
        max_abs=max(float((a - b).abs().max()) for a, b in pairs),
        largest=max(float(a.abs().max()) for a, _ in pairs),
        num_positions=sum(len(a) for a, _ in pairs),
        num_other_argmax=sum(int((a.argmax(-1) != b.argmax(-1)).sum()) for a, b in pairs),
    )

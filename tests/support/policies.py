"""A tiny random Qwen3, a fixed batch and an Actor on the calling rank's topology."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from aer_megatron.config import Config
from aer_megatron.convert.hf_config import architecture_from_hf_config
from aer_megatron.types import TrainBatch
from tests.support.experiences import experience_of
from tests.support.tiny_models import SIZES, tiny_hf_model

VOCAB_SIZE: int = SIZES["vocab_size"]


def _one_tensor_per_expert(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the tensors as a checkpoint has them: transformers stacks the experts' once they are loaded."""
    weights = {}
    for name, tensor in state.items():
        prefix, _, kind = name.rpartition(".experts.")
        if kind == "gate_up_proj":
            for expert, rows in enumerate(tensor):
                for part, matrix in zip(("gate_proj", "up_proj"), rows.chunk(2), strict=True):
                    weights[f"{prefix}.experts.{expert}.{part}.weight"] = matrix
        elif kind == "down_proj":
            weights |= {f"{prefix}.experts.{expert}.down_proj.weight": rows for expert, rows in enumerate(tensor)}
        else:
            weights[name] = tensor
    return weights


def policy_config(**sections: dict[str, Any]) -> Config:
    """Returns a run configuration for the tiny model; keyword tables are merged over fp32 defaults."""
    table: dict[str, Any] = {
        "model": {"path": "unused", "dtype": "fp32"},
        "data": {"train": {"task": "countdown", "options": {"split": "train"}}},
        "parallel": {"micro_batch_size": 3},
        # a large eps: Adam would turn the rounding of near-zero gradients into whole steps
        "optimizer": {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-4},
        "algo": {"num_minibatches": 1},
    }
    for name, section in sections.items():
        table[name] = {**table.get(name, {}), **section}
    return Config.from_table(table)


def fixed_batch(num_sequences: int = 12, seed: int = 0) -> TrainBatch:
    """Returns ragged random sequences with advantages and entropy weights of both signs and sizes."""
    rng = np.random.default_rng(seed)
    prompt_B = rng.integers(2, 6, num_sequences).astype(np.int64)
    response_B = rng.integers(1, 9, num_sequences).astype(np.int64)
    tokens = rng.integers(0, VOCAB_SIZE, int((prompt_B + response_B).sum())).astype(np.int64)
    num_tokens = int(response_B.sum())
    return TrainBatch(
        experience=experience_of(prompt_B, response_B, tokens),
        advantage_B=rng.normal(size=num_sequences),
        entropy_weight_B=rng.uniform(0.0, 0.5, num_sequences),
        old_logprob_T=(-3.0 + 0.1 * rng.normal(size=num_tokens)).astype(np.float32),
    )


def build_topology(config: Config) -> Any:
    """Returns the calling rank's topology; the groups of an earlier one are left first."""
    from aer_megatron.parallel.topology import initialize_topology, leave_layout

    leave_layout()
    parallel = config.parallel
    return initialize_topology(tp=parallel.tp, pp=parallel.pp, vpp=parallel.vpp, cp=parallel.cp, ep=parallel.ep, seed=1)


def build_actor(config: Config, *, tied: bool = True, topology: Any = None, model: Any = None) -> Any:
    """Returns an Actor with the tiny model's weights; the default process group must exist.

    Without a ``topology`` to share with other actors it builds its own, so layouts can follow one another.
    """
    from aer_megatron.actor.actor import Actor

    topology = topology or build_topology(config)
    model = model or tiny_hf_model(tied=tied)
    arch = architecture_from_hf_config(model.config.to_dict())
    actor = Actor(
        arch, config, topology, device=torch.device("cpu"), optimizer=config.optimizer, num_updates_planned=10
    )
    weights = _one_tensor_per_expert(model.state_dict())
    actor.load_hf_weights(weights.__getitem__)
    return actor

"""Everything that one rank's actor holds, and where two such states differ."""

from __future__ import annotations

from typing import Any

import torch


def snapshot(actor: Any) -> dict[str, torch.Tensor]:
    """Every tensor that a rank holds: model, main parameters, moments (through the optimizer itself), random states."""
    from aer_megatron.checkpoint.tensors import rng_tensors

    tensors = {f"model/{name}": value for name, value in actor.model.named_parameters()}
    for index, optimizer in enumerate(getattr(actor.optimizer, "chained_optimizers", [actor.optimizer])):
        inner = optimizer.optimizer.state_dict()
        for place, state in inner["state"].items():
            tensors |= {f"optimizer{index}/{place}/{name}": value for name, value in state.items()}
        main = [p for group in optimizer.optimizer.param_groups for p in group["params"]]
        tensors |= {f"main{index}/{place}": value for place, value in enumerate(main)}
    tensors |= {f"rng/{name}": value for name, value in rng_tensors().items()}
    return {name: value.detach().clone() for name, value in tensors.items()}


def differences(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Returns the names of tensors that differ in a bit or are in one of the two alone."""
    same = [name for name in one.keys() & other.keys() if torch.equal(one[name], other[name])]
    return sorted((one.keys() | other.keys()) - set(same))

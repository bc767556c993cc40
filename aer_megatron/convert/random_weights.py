"""Random initial weights in Hugging Face names, for training from scratch."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor


def random_hf_weights(path: str | os.PathLike[str], seed: int) -> Callable[[str], Tensor]:
    """Returns a getter of fp32 tensors as transformers initialises the architecture of ``path``/config.json.

    The same ``seed`` gives the same weights on every rank, whatever the parallel layout.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=torch.float32)
    weights = model.state_dict()
    return lambda name: weights[name]

"""Token data of the policy loss with the rules that a test does not name switched off."""

from __future__ import annotations

from typing import Any

import torch

from aer_megatron.algo.loss import TokenData


def token_data(old_logprob_T: torch.Tensor, advantage_T: torch.Tensor, **given: Any) -> TokenData:
    """Returns the data of plain GRPO (engine and trainer agree, token mean, no bonus), fields of ``given`` replaced."""
    plain: dict[str, Any] = {
        "old_logprob_T": old_logprob_T,
        "advantage_T": advantage_T,
        "entropy_weight_T": torch.zeros_like(old_logprob_T),
        "mean_weight_T": torch.ones_like(old_logprob_T),
        "selected_T": None,
        "ref_logprob_T": None,
    }
    return TokenData(**{**plain, **given})

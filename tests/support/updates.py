"""One update whose memory is measured: its batch, the textbook head that ours is compared with, and what is alive."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aer_megatron.algo.entropy import LogprobEntropy
from aer_megatron.types import TrainBatch
from tests.support.experiences import experience_of


def textbook(logits_TW: Tensor, labels_T: Tensor, **options: Any) -> LogprobEntropy:
    """Returns the same two vectors as the kernel, as anyone would write them."""
    logp_TV = torch.log_softmax(logits_TW.float() / options["temperature"], dim=-1)
    return LogprobEntropy(logp_TV.gather(1, labels_T[:, None]).squeeze(1), -(logp_TV.exp() * logp_TV).sum(-1))


def uniform_batch(sequences: int, length: int, *, vocab_size: int, old_logprob: float) -> TrainBatch:
    """Returns random sequences of one length, a quarter prompt and three quarters response."""
    rng = np.random.default_rng(0)
    prompt = length // 4
    experience = experience_of(
        np.full(sequences, prompt, dtype=np.int64),
        np.full(sequences, length - prompt, dtype=np.int64),
        rng.integers(0, vocab_size, sequences * length).astype(np.int64),
    )
    return TrainBatch(
        experience=experience,
        advantage_B=rng.normal(size=sequences),
        entropy_weight_B=rng.uniform(0.0, 0.1, sequences),
        old_logprob_T=np.full(experience.num_sampled_tokens, old_logprob, dtype=np.float32),
    )


def live_tensors() -> list[Tensor]:
    """Returns every tensor with memory that Python can reach."""
    gc.collect()
    return [item for item in gc.get_objects() if isinstance(item, Tensor) and item.untyped_storage().nbytes()]

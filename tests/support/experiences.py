"""Sequences of given lengths as an ``Experience``, for the tests and benchmarks that need no rollout."""

from __future__ import annotations

import numpy as np

from aer_megatron.types import Experience, Int64Array


def experience_of(prompt_B: Int64Array, response_B: Int64Array, token_ids_L: Int64Array) -> Experience:
    """Returns sequences of these lengths, each its own group, with zeros for whatever a rollout adds."""
    num_sequences = len(prompt_B)
    return Experience(
        prompt_id_B=np.arange(num_sequences, dtype=np.uint64),
        group_index_B=np.arange(num_sequences, dtype=np.int64),
        prompt_length_B=prompt_B,
        response_length_B=response_B,
        token_ids_L=token_ids_L,
        rollout_logprob_T=np.zeros(int(response_B.sum()), dtype=np.float32),
        reward_B=np.zeros(num_sequences),
        truncated_B=np.zeros(num_sequences, dtype=np.bool_),
        policy_version_B=np.zeros(num_sequences, dtype=np.int64),
        policy_version_sum_B=np.zeros(num_sequences, dtype=np.int64),
    )

"""Sequences of given lengths as an ``Experience``, for the tests and benchmarks that need no rollout."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from aer_megatron.algo.experience import sampled_mask
from aer_megatron.types import BoolArray, Experience, Int64Array, PackedSequences, TrainBatch


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


def random_mask(sequences: PackedSequences, seed: int) -> BoolArray:
    """Returns ``sampled_L`` with about half of the response tokens, not the first one where there are two or more."""
    rng = np.random.default_rng(seed)
    end_B = np.cumsum(sequences.prompt_length_B + sequences.response_length_B)
    sampled_L = sampled_mask(sequences) & (rng.random(int(end_B[-1])) < 0.5)
    sampled_L[end_B - sequences.response_length_B] = False
    masked = replace(sequences, sampled_L=sampled_L)
    sampled_L[end_B[masked.sampled_length_B == 0] - 1] = True
    return sampled_L


def with_mask(experience: Experience, sampled_L: BoolArray) -> Experience:
    """Returns the experience, of which all was sampled, with what is not in ``sampled_L`` turned into context."""
    rollout_logprob_T = experience.rollout_logprob_T[sampled_L[sampled_mask(experience)]]
    return replace(experience, sampled_L=sampled_L, rollout_logprob_T=rollout_logprob_T)


def with_context(batch: TrainBatch, seed: int = 1) -> TrainBatch:
    """Returns the batch as if a tool had said some of its response tokens."""
    sampled_L = random_mask(batch.experience, seed)
    old_logprob_T = batch.old_logprob_T[sampled_L[sampled_mask(batch.experience)]]
    return replace(batch, experience=with_mask(batch.experience, sampled_L), old_logprob_T=old_logprob_T)

"""Packs scored rollout groups into the arrays of an Experience, and picks and joins groups of it.

Shape suffixes: P prompts, B sequences, T packed response tokens, L packed prompt + response tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aer_megatron.algo.advantage import AdvantageResult
from aer_megatron.types import Completion, Experience, ScoredGroup


@dataclass(frozen=True, slots=True)
class Staleness:
    """Policy versions between sampling and training. Example: ``Staleness(largest=1, mean=0.25)``, over all tokens."""

    largest: int
    mean: float


def pack_groups(groups: Sequence[ScoredGroup]) -> Experience:
    """Returns the packed arrays of ``groups`` in their order; ``group_index_B`` counts from 0.

    Raises:
        ValueError: a completion has no tokens, or not one log-probability per token, naming the prompt.
    """
    pairs = [
        (index, scored.group.prompt, completion, verdict)
        for index, scored in enumerate(groups)
        for completion, verdict in zip(scored.group.completions, scored.verdicts, strict=True)
    ]
    for _, prompt, completion, _ in pairs:
        if not completion.token_ids or len(completion.token_ids) != len(completion.logprobs):
            raise ValueError(
                f"a completion of prompt {prompt.id:#x} has {len(completion.token_ids)} tokens and "
                f"{len(completion.logprobs)} log-probabilities; the engine owes one for each of at least one token"
            )
    tokens = [np.asarray(p.token_ids + c.token_ids, dtype=np.int64) for _, p, c, _ in pairs]
    logprobs = [np.asarray(c.logprobs, dtype=np.float32) for _, _, c, _ in pairs]
    return Experience(
        prompt_id_B=np.array([p.id for _, p, _, _ in pairs], dtype=np.uint64),
        group_index_B=np.array([index for index, *_ in pairs], dtype=np.int64),
        prompt_length_B=np.array([len(p.token_ids) for _, p, _, _ in pairs], dtype=np.int64),
        response_length_B=np.array([len(c.token_ids) for _, _, c, _ in pairs], dtype=np.int64),
        token_ids_L=np.concatenate(tokens) if tokens else np.zeros(0, dtype=np.int64),
        rollout_logprob_T=np.concatenate(logprobs) if logprobs else np.zeros(0, dtype=np.float32),
        reward_B=np.array([v.reward for *_, v in pairs], dtype=np.float64),
        truncated_B=np.array([c.finish_reason == "length" for _, _, c, _ in pairs], dtype=np.bool_),
        policy_version_B=np.array(
            [min(span.version for span in c.policy_versions) for _, _, c, _ in pairs], dtype=np.int64
        ),
        policy_version_sum_B=np.array([_version_sum(c) for _, _, c, _ in pairs], dtype=np.int64),
    )


def join_experiences(parts: Sequence[Experience]) -> Experience:
    """Returns one Experience of all ``parts`` in order, groups renumbered 0..P-1."""
    shifted, first = [], 0
    for part in parts:
        shifted.append(dataclasses.replace(part, group_index_B=part.group_index_B + first))
        first += num_groups(part)
    arrays: dict[str, NDArray[Any]] = {
        field.name: np.concatenate([getattr(part, field.name) for part in shifted])
        for field in dataclasses.fields(Experience)
    }
    return Experience(**arrays)


def select_groups(experience: Experience, keep_P: NDArray[np.bool_]) -> Experience:
    """Returns the groups where ``keep_P`` is true, in order, renumbered 0..P'-1."""
    keep_B = keep_P[experience.group_index_B]
    new_index_P = np.cumsum(keep_P) - 1
    response_T = np.repeat(keep_B, experience.response_length_B)
    token_L = np.repeat(keep_B, experience.prompt_length_B + experience.response_length_B)
    return Experience(
        prompt_id_B=experience.prompt_id_B[keep_B],
        group_index_B=new_index_P[experience.group_index_B[keep_B]],
        prompt_length_B=experience.prompt_length_B[keep_B],
        response_length_B=experience.response_length_B[keep_B],
        token_ids_L=experience.token_ids_L[token_L],
        rollout_logprob_T=experience.rollout_logprob_T[response_T],
        reward_B=experience.reward_B[keep_B],
        truncated_B=experience.truncated_B[keep_B],
        policy_version_B=experience.policy_version_B[keep_B],
        policy_version_sum_B=experience.policy_version_sum_B[keep_B],
    )


def num_groups(experience: Experience) -> int:
    """Returns P, the number of groups."""
    return int(experience.group_index_B[-1]) + 1 if experience.num_sequences else 0


def mixed_groups(result: AdvantageResult) -> NDArray[np.bool_]:
    """Returns bool [P]: groups solved sometimes, neither always nor never (what dynamic sampling keeps)."""
    return (result.successes_P > 0) & (result.successes_P < result.counts_P)


def staleness(experience: Experience, *, policy_version: int) -> Staleness:
    """Returns how far the tokens' versions are behind ``policy_version``, the policy about to be trained on them."""
    num_tokens = experience.num_response_tokens
    if not num_tokens:
        return Staleness(0, 0.0)
    total = policy_version * num_tokens - int(experience.policy_version_sum_B.sum())
    return Staleness(policy_version - int(experience.policy_version_B.min()), total / num_tokens)


def _version_sum(completion: Completion) -> int:
    return sum(span.version * (span.end - span.start) for span in completion.policy_versions)

"""Packs scored rollout groups into the arrays of an Experience, and picks and joins groups of it.

Shape suffixes: P prompts, B sequences, T packed sampled tokens, L packed prompt + response tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aer_megatron.algo.advantage import Verdicts
from aer_megatron.types import BoolArray, Completion, Experience, PackedSequences, Prompt, ScoredGroup


@dataclass(frozen=True, slots=True)
class Staleness:
    """Policy versions between a token's sampling and training. Example: ``Staleness(largest=1, mean=0.25)``."""

    largest: int
    mean: float


def pack_groups(groups: Sequence[ScoredGroup]) -> Experience:
    """Returns the packed arrays of ``groups`` in their order; ``group_index_B`` counts from 0.

    Raises:
        ValueError: a completion has no sampled token, spans that are not in order, or not one log-probability per
            sampled token, naming the prompt.
    """
    pairs = [
        (index, scored.group.prompt, completion, verdict)
        for index, scored in enumerate(groups)
        for completion, verdict in zip(scored.group.completions, scored.verdicts, strict=True)
    ]
    for _, prompt, completion, _ in pairs:
        _check(prompt, completion)
    tokens = [np.asarray(p.token_ids + c.token_ids, dtype=np.int64) for _, p, c, _ in pairs]
    logprobs = [np.asarray(c.logprobs, dtype=np.float32) for _, _, c, _ in pairs]
    return Experience(
        prompt_id_B=np.array([p.id for _, p, _, _ in pairs], dtype=np.uint64),
        group_index_B=np.array([index for index, *_ in pairs], dtype=np.int64),
        prompt_length_B=np.array([len(p.token_ids) for _, p, _, _ in pairs], dtype=np.int64),
        response_length_B=np.array([len(c.token_ids) for _, _, c, _ in pairs], dtype=np.int64),
        token_ids_L=np.concatenate(tokens) if tokens else np.zeros(0, dtype=np.int64),
        sampled_L=_sampled([(prompt, completion) for _, prompt, completion, _ in pairs]),
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
        if field.name != "sampled_L"
    }
    whole = all(part.sampled_L is None for part in parts)
    return Experience(**arrays, sampled_L=None if whole else np.concatenate([sampled_mask(part) for part in parts]))


def select_groups(experience: Experience, keep_P: NDArray[np.bool_]) -> Experience:
    """Returns the groups where ``keep_P`` is true, in order, renumbered 0..P'-1."""
    keep_B = keep_P[experience.group_index_B]
    new_index_P = np.cumsum(keep_P) - 1
    sampled_T = np.repeat(keep_B, experience.sampled_length_B)
    token_L = np.repeat(keep_B, experience.length_B)
    return Experience(
        prompt_id_B=experience.prompt_id_B[keep_B],
        group_index_B=new_index_P[experience.group_index_B[keep_B]],
        prompt_length_B=experience.prompt_length_B[keep_B],
        response_length_B=experience.response_length_B[keep_B],
        token_ids_L=experience.token_ids_L[token_L],
        sampled_L=None if experience.sampled_L is None else experience.sampled_L[token_L],
        rollout_logprob_T=experience.rollout_logprob_T[sampled_T],
        reward_B=experience.reward_B[keep_B],
        truncated_B=experience.truncated_B[keep_B],
        policy_version_B=experience.policy_version_B[keep_B],
        policy_version_sum_B=experience.policy_version_sum_B[keep_B],
    )


def sampled_mask(sequences: PackedSequences) -> BoolArray:
    """Returns bool [L], true where the policy sampled the token: ``sampled_L``, or what its absence stands for."""
    if sequences.sampled_L is not None:
        return sequences.sampled_L
    length_2B = np.stack([sequences.prompt_length_B, sequences.response_length_B], axis=1).reshape(-1)
    return np.repeat(np.arange(len(length_2B)) % 2 == 1, length_2B)


def num_groups(experience: Experience) -> int:
    """Returns P, the number of groups."""
    return int(experience.group_index_B[-1]) + 1 if experience.num_sequences else 0


def mixed_groups(verdicts: Verdicts) -> NDArray[np.bool_]:
    """Returns bool [P]: groups solved sometimes, neither always nor never (what dynamic sampling keeps)."""
    return (verdicts.successes_P > 0) & (verdicts.successes_P < verdicts.counts_P)


def staleness(experience: Experience, *, policy_version: int) -> Staleness:
    """Returns how far the tokens' versions are behind ``policy_version``, the policy about to be trained on them."""
    num_tokens = experience.num_sampled_tokens
    if not num_tokens:
        return Staleness(0, 0.0)
    total = policy_version * num_tokens - int(experience.policy_version_sum_B.sum())
    return Staleness(policy_version - int(experience.policy_version_B.min()), total / num_tokens)


def _check(prompt: Prompt, completion: Completion) -> None:
    spans, num_tokens = completion.policy_versions, len(completion.token_ids)
    starts, ends = [span.start for span in spans], [span.end for span in spans]
    gaps = zip([0, *ends], [*starts, num_tokens], strict=True)
    in_order = all(end <= start for end, start in gaps) and all(span.start < span.end for span in spans)
    if not (in_order and 0 < sum(ends) - sum(starts) == len(completion.logprobs)):
        raise ValueError(
            f"a completion of prompt {prompt.id:#x} has {num_tokens} tokens, {len(completion.logprobs)} "
            f"log-probabilities and {spans}; its maker owes spans in order within the tokens and one log-probability "
            "for each of at least one token in them"
        )


def _sampled(pairs: Sequence[tuple[Prompt, Completion]]) -> BoolArray | None:
    """Returns bool [L], or None where every response token was sampled."""
    if all(len(completion.logprobs) == len(completion.token_ids) for _, completion in pairs):
        return None
    masks = []
    for prompt, completion in pairs:
        mask = np.zeros(len(prompt.token_ids) + len(completion.token_ids), dtype=np.bool_)
        for span in completion.policy_versions:
            mask[len(prompt.token_ids) + span.start : len(prompt.token_ids) + span.end] = True
        masks.append(mask)
    return np.concatenate(masks)


def _version_sum(completion: Completion) -> int:
    return sum(span.version * (span.end - span.start) for span in completion.policy_versions)

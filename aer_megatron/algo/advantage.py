"""Advantages of a rollout batch by a rule, with its verdicts per prompt; DAPO's reward shaping for long responses.

Shape suffixes: P prompts, B sequences.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from aer_megatron.algo.advantages.base import Advantage
from aer_megatron.algo.options import AlgoSection
from aer_megatron.types import Experience, Float64Array, Int64Array, UInt64Array


@dataclass(frozen=True, slots=True)
class Verdicts:
    """Verdict counts per prompt, prompts in the order of their groups.

    Example (one prompt, rewards 1 and 0): ``accuracy_P=[0.5], counts_P=[2], successes_P=[1], prompt_id_P=[0x9AE1]``.
    """

    accuracy_P: Float64Array  # successes / counts
    counts_P: Int64Array
    successes_P: Int64Array  # verdicts: rewards >= 1, before any shaping
    prompt_id_P: UInt64Array


@dataclass(frozen=True, slots=True)
class AdvantageResult(Verdicts):
    """The verdicts with an advantage per sequence, and what its rule reports of its own, (sum, count) by name."""

    advantage_B: Float64Array
    reported: dict[str, tuple[float, float]] = field(default_factory=dict)


def group_verdicts(experience: Experience) -> Verdicts:
    """Returns the verdict counts of each prompt.

    Raises:
        ValueError: ``group_index_B`` is not 0..P-1, or a group mixes prompts.
    """
    group_index_B = experience.group_index_B
    group_P, first_B, counts_P = np.unique(group_index_B, return_index=True, return_counts=True)
    if not np.array_equal(group_P, np.arange(group_P.size)):
        raise ValueError(f"group_index_B must number the groups 0..P-1 without gaps, got {group_P[:8]}")
    prompt_id_P = experience.prompt_id_B[first_B]
    if not np.array_equal(prompt_id_P[group_index_B], experience.prompt_id_B):
        raise ValueError("prompt_id_B differs within a group; a group is the rollouts of one prompt")
    successes_P = np.bincount(group_index_B[experience.reward_B >= 1.0], minlength=group_P.size)
    return Verdicts(successes_P / counts_P, counts_P, successes_P, prompt_id_P)


def group_advantages(
    experience: Experience, rule: Advantage, *, penalty_B: Float64Array | None = None
) -> AdvantageResult:
    """Returns the advantages by ``rule``, float64 [B], with the verdict counts per prompt.

    ``penalty_B`` (from ``overlong_penalty``) is subtracted from the rewards for the advantage alone: successes and
    accuracy are those of the verdicts.

    Raises:
        ValueError: as in ``group_verdicts``, a reward is not finite, or the rule returns another shape or reports what
            it did not declare.
    """
    verdicts = group_verdicts(experience)
    reward_B = experience.reward_B if penalty_B is None else experience.reward_B - penalty_B
    advantage_B, reported = rule.advantages(reward_B, experience.group_index_B)
    if advantage_B.shape != reward_B.shape or not reported.keys() <= set(rule.reports):
        raise ValueError(
            f"algo.advantage.kind={rule.kind!r} must return one advantage per sequence, {reward_B.shape}, and report "
            f"among {list(rule.reports)}; it returned {advantage_B.shape}, {sorted(reported)}"
        )
    return AdvantageResult(
        accuracy_P=verdicts.accuracy_P,
        counts_P=verdicts.counts_P,
        successes_P=verdicts.successes_P,
        prompt_id_P=verdicts.prompt_id_P,
        advantage_B=advantage_B,
        reported=reported,
    )


def overlong_penalty(experience: Experience, config: AlgoSection, *, max_new_tokens: int) -> Float64Array | None:
    """Returns what a response's length costs, float64 [B] in units of reward, or None where the penalty is off.

    0 up to max_new_tokens - overlong_buffer tokens, then linear up to ``config.overlong_penalty`` at max_new_tokens
    (the soft overlong punishment of DAPO, arXiv 2503.14476).
    """
    if not config.overlong_buffer:
        return None
    excess_B = experience.response_length_B - (max_new_tokens - config.overlong_buffer)
    penalty_B: Float64Array = config.overlong_penalty * np.clip(excess_B / config.overlong_buffer, 0.0, 1.0)
    return penalty_B

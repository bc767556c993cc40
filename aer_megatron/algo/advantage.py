"""Group-relative advantages of a rollout batch (GRPO, Dr.GRPO), computed by the C++ group statistics; DAPO's reward
shaping for long responses.

Shape suffixes: P prompts, B sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aer_megatron import _C
from aer_megatron.algo.options import AlgoSection
from aer_megatron.types import Experience, Float64Array, Int64Array, UInt64Array


@dataclass(frozen=True, slots=True)
class AdvantageResult:
    """Advantages per sequence and verdict counts per prompt, prompts in the order of their groups.

    Example (one prompt, rewards 1 and 0, no division by the std):
    ``advantage_B=[0.5, -0.5], accuracy_P=[0.5], counts_P=[2], successes_P=[1], prompt_id_P=[0x9AE1]``.
    """

    advantage_B: Float64Array
    accuracy_P: Float64Array  # successes / counts
    counts_P: Int64Array
    successes_P: Int64Array  # verdicts: rewards >= 1, before any shaping
    prompt_id_P: UInt64Array


def group_advantages(
    experience: Experience, config: AlgoSection, *, penalty_B: Float64Array | None = None
) -> AdvantageResult:
    """Returns A = (R - mean) / (std + eps) per prompt group, float64 [B], with the verdict counts per prompt.

    std is the unbiased one (n - 1). ``divide_by_std = False`` leaves out the division (Dr.GRPO, arXiv
    2503.20783); with it the formula is GRPO's (arXiv 2402.03300). Equal rewards in a group give zeros.
    ``penalty_B`` (from ``overlong_penalty``) is subtracted from R for the advantage alone: successes and accuracy are
    those of the verdicts.

    Raises:
        ValueError: ``group_index_B`` is not 0..P-1, or a group mixes prompts.
    """
    group_index_B = experience.group_index_B
    group_P, first_B = np.unique(group_index_B, return_index=True)
    if not np.array_equal(group_P, np.arange(group_P.size)):
        raise ValueError(f"group_index_B must number the groups 0..P-1 without gaps, got {group_P[:8]}")
    prompt_id_P = experience.prompt_id_B[first_B]
    if not np.array_equal(prompt_id_P[group_index_B], experience.prompt_id_B):
        raise ValueError("prompt_id_B differs within a group; a group is the rollouts of one prompt")
    statistics = _C.group_statistics(
        group_index_B,
        experience.reward_B,
        std_epsilon=config.std_epsilon,
        divide_by_std=config.divide_by_std,
    )
    advantage_B = statistics.advantage
    if penalty_B is not None:
        advantage_B = _C.group_statistics(
            group_index_B,
            experience.reward_B - penalty_B,
            std_epsilon=config.std_epsilon,
            divide_by_std=config.divide_by_std,
        ).advantage
    order = np.argsort(statistics.group_ids)  # to prompt order, whatever order the extension reports
    counts_P, successes_P = statistics.counts[order], statistics.successes[order]
    return AdvantageResult(
        advantage_B=advantage_B,
        accuracy_P=successes_P / counts_P,
        counts_P=counts_P,
        successes_P=successes_P,
        prompt_id_P=prompt_id_P,
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

"""What the difficulty ledger is told of a rollout batch, and the accuracy of a prompt that difficulty is read from.

Shape suffixes: P prompts, B sequences, T packed sampled tokens.

This file does NOT hold the evidence itself (the C++ ``DifficultyLedger``).
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from aer_megatron._C import DifficultyLedger
from aer_megatron.algo.advantage import Verdicts
from aer_megatron.algo.options import LedgerSection
from aer_megatron.types import Experience, Float32Array, Float64Array, Int64Array, UInt64Array


def group_token_entropy(experience: Experience, token_entropy_T: Float32Array) -> tuple[Float64Array, Int64Array]:
    """Returns (entropy_sum_P in nats, float64 [P]; token_count_P, int64 [P]) over each prompt's sampled tokens.

    A token whose entropy is not finite is in neither: the ledger lives longer than the fault that made it.

    Raises:
        ValueError: ``token_entropy_T`` is not one value per sampled token.
    """
    if token_entropy_T.shape != (experience.num_sampled_tokens,):
        raise ValueError(
            f"token_entropy_T {token_entropy_T.shape} must hold one value per sampled token, "
            f"{experience.num_sampled_tokens}"
        )
    num_prompts = int(experience.group_index_B.max()) + 1 if experience.num_sequences else 0
    group_index_T = np.repeat(experience.group_index_B, experience.sampled_length_B)
    entropy_sum_P: Float64Array = np.zeros(num_prompts, dtype=np.float64)
    token_count_P: Int64Array = np.zeros(num_prompts, dtype=np.int64)
    usable_T = np.isfinite(token_entropy_T)
    np.add.at(entropy_sum_P, group_index_T[usable_T], token_entropy_T[usable_T])
    np.add.at(token_count_P, group_index_T[usable_T], 1)
    return entropy_sum_P, token_count_P


def update_ledger(
    ledger: DifficultyLedger,
    verdicts: Verdicts,
    *,
    entropy_sum_P: Float64Array,
    token_count_P: Int64Array,
    step: int,
) -> None:
    """Returns nothing; adds the evidence of one rollout batch to ``ledger``, in place and in one call."""
    ledger.update(
        verdicts.prompt_id_P, verdicts.counts_P, verdicts.successes_P, entropy_sum_P, token_count_P, step=step
    )


def difficulty_accuracy(
    source: Literal["group", "ledger"],
    group_mean_P: Float64Array,
    ledger: DifficultyLedger,
    prompt_ids: UInt64Array,
    config: LedgerSection,
    step: int,
) -> Float64Array:
    """Returns the accuracy that difficulty is read from, float64 [P].

    ``group``: this step's accuracy, ``group_mean_P``. ``ledger`` (ours): the posterior mean of
    Beta(prior_success + decayed successes, prior_failure + decayed failures); call ``update_ledger`` first
    for it to include this step.

    Raises:
        ValueError: the source is unknown.
    """
    if source == "group":
        return group_mean_P
    if source != "ledger":
        raise ValueError(f"source={source!r} is not one of group, ledger")
    return ledger.posterior_mean(
        prompt_ids,
        prior_success=config.prior_success,
        prior_failure=config.prior_failure,
        step=step,
    )

"""Flight records of a synthetic run: a real controller in closed loop with a noisy entropy."""

from __future__ import annotations

import numpy as np

from aer_megatron.algo import controller
from aer_megatron.algo.advantage import AdvantageResult
from aer_megatron.algo.controller import Observation
from aer_megatron.algo.difficulty import difficulty
from aer_megatron.algo.entropy_rules.base import EntropyRule
from aer_megatron.algo.flight import FlightRecord, profile_batch
from aer_megatron.types import Experience, PolicyScores

NUM_PROMPTS, GROUP_SIZE = 6, 4


def flight_records(options: EntropyRule, num_steps: int, *, seed: int = 0) -> list[FlightRecord]:
    """Returns ``num_steps`` records whose states are those of ``options`` on a random, falling entropy."""
    rng = np.random.default_rng(seed)
    state = controller.initial_state(options)
    records = []
    for step in range(num_steps):
        experience, scores = _batch(rng, level=0.98**step + 3 * state.alpha)
        successes_P = rng.integers(0, GROUP_SIZE + 1, NUM_PROMPTS)
        counts_P = np.full(NUM_PROMPTS, GROUP_SIZE)
        advantages = AdvantageResult(
            advantage_B=rng.normal(size=experience.num_sequences),
            accuracy_P=successes_P / counts_P,
            counts_P=counts_P,
            successes_P=successes_P,
            prompt_id_P=np.arange(NUM_PROMPTS, dtype=np.uint64),
        )
        d_P = difficulty(advantages.accuracy_P, shape=options.difficulty, rho=options.rho)
        observation = Observation(
            float(scores.token_entropy_T.sum(dtype=np.float64)), float(len(scores.token_entropy_T)), float(d_P.mean())
        )
        decision = controller.step(state, options, observation)
        state = decision.state
        records.append(
            FlightRecord(
                step=step,
                observation=observation,
                state=state,
                coefficient=decision.coefficient,
                successes_P=successes_P,
                counts_P=counts_P,
                ledger_accuracy_P=rng.random(NUM_PROMPTS),
                profile=profile_batch(experience, scores, advantages, d_P),
                clip_low=(float(rng.integers(9)), 100.0),
                clip_high=(float(rng.integers(9)), 100.0),
            )
        )
    return records


def _batch(rng: np.random.Generator, *, level: float) -> tuple[Experience, PolicyScores]:
    num_sequences = NUM_PROMPTS * GROUP_SIZE
    length_B = rng.integers(1, 9, num_sequences)
    num_tokens = int(length_B.sum())
    group_B = np.repeat(np.arange(NUM_PROMPTS), GROUP_SIZE)
    experience = Experience(
        prompt_id_B=group_B.astype(np.uint64),
        group_index_B=group_B,
        prompt_length_B=np.ones_like(length_B),
        response_length_B=length_B,
        token_ids_L=np.zeros(num_tokens + num_sequences, dtype=np.int64),
        rollout_logprob_T=np.zeros(num_tokens, dtype=np.float32),
        reward_B=rng.random(num_sequences),
        truncated_B=np.zeros(num_sequences, dtype=bool),
        policy_version_B=np.zeros_like(length_B),
        policy_version_sum_B=np.zeros_like(length_B),
    )
    columns = [rng.random(num_tokens).astype(np.float32) for _ in range(4)]
    scores = PolicyScores(-columns[0], np.float32(level) * columns[0], *columns[1:])
    return experience, scores

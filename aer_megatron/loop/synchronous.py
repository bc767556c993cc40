"""THE loop: GRPO with adaptive entropy regularization, one rollout batch per step.

    prompts -> rollouts -> rewards -> (everything on every rank) Experience
        -> score: old log-probabilities and exact entropies under the policy that sampled
        -> assess: advantages, difficulty, the controller's observation -> controller update
        -> train: one or more optimizer steps -> publish the weights

Two values come back from a step to the next: ``controller_state`` and ``policy_version``; both are local variables of
``train``. What persists beside them (data cursor, ledger, weights) belongs to the part that owns it.

This file decides when and in which order; phases.py says what happens, asynchronous.py is the other order. It does NOT
know torch, ranks, files or how any part works.
"""

from __future__ import annotations

from aer_megatron.loop.parts import Begin, Progress
from aer_megatron.loop.phases import Phases


def train(phases: Phases) -> int:
    """Runs steps ``start.next_step`` to ``config.run.num_steps - 1``; returns the next step, with everything saved.

    That is ``num_steps``, or less where the run was asked to stop.
    """
    with phases.evaluating() as begin_evaluation:
        return _train(phases, begin_evaluation)


def _train(phases: Phases, begin_evaluation: Begin) -> int:
    start, num_steps = phases.start, phases.config.run.num_steps
    next_step, controller_state, policy_version = start.next_step, start.controller_state, start.policy_version
    phases.publish(policy_version)

    for step in range(start.next_step, num_steps):
        collected = phases.collect(phases.begin_rollouts(step))
        evaluation = phases.begin_evaluation(step, begin_evaluation)  # servers are idle from here on
        phases.release_memory()
        controller_state = phases.policy_step(step, collected, controller_state, policy_version, evaluation)
        next_step, policy_version = step + 1, policy_version + 1
        cursor = phases.parts.prompts.state_dict()
        if phases.end_step(Progress(next_step, policy_version, controller_state, cursor)):
            break
    phases.finish()
    if next_step == num_steps:
        phases.evaluate_last()
    return next_step

"""The asynchronous loop: the servers generate later batches while a batch is trained on.

    step n:   launch batches up to n + k | wait for batch n -> score -> assess -> controller -> train -> publish
    beside:   ... batch n | batch n + 1 | ... one after the other, going on over every publication

k is ``rollout.staleness``. Batch n is launched when the policy of step n - k or later is published, so none of its
tokens is more than k versions behind the policy that trains on it. A publication interrupts what is under way: those
completions keep their tokens and go on under the new weights (sglang/engine.py), so no publication waits for a
generation. The order of batches is the order of steps on every rank; only waiting for servers leaves the main thread.

What happens in a step, shared with the synchronous loop, is in phases.py.
"""

from __future__ import annotations

from collections import deque

from aer_megatron.algo.experience import staleness
from aer_megatron.loop.beside import beside
from aer_megatron.loop.parts import Begin, Progress
from aer_megatron.loop.phases import Phases, Rollouts


def train_ahead(phases: Phases) -> int:
    """Runs the steps as ``synchronous.train`` does, generating ahead; returns the next step, with everything saved."""
    with beside("rollouts") as begin, phases.evaluating() as begin_evaluation:
        return _train_ahead(phases, begin, begin_evaluation)


def _train_ahead(phases: Phases, begin: Begin, begin_evaluation: Begin) -> int:
    start, num_steps, most_stale = phases.start, phases.config.run.num_steps, phases.config.rollout.staleness
    next_step, controller_state, policy_version = start.next_step, start.controller_state, start.policy_version
    phases.publish(policy_version)

    ahead: deque[Rollouts] = deque()
    for step in range(start.next_step, num_steps):
        evaluation = phases.begin_evaluation(step, begin_evaluation)
        while len(ahead) <= most_stale and step + len(ahead) < num_steps:
            ahead.append(phases.begin_rollouts(step + len(ahead), begin))
        collected = phases.collect(ahead.popleft())
        assert staleness(collected.experience, policy_version=policy_version).largest <= most_stale
        controller_state = phases.policy_step(step, collected, controller_state, policy_version, evaluation)
        next_step, policy_version = step + 1, policy_version + 1
        pending = tuple(rollouts.pending for rollouts in ahead)
        cursor = phases.parts.prompts.state_dict()
        if phases.end_step(Progress(next_step, policy_version, controller_state, cursor, pending)):
            break
    phases.finish()
    if next_step == num_steps:
        phases.evaluate_last()
    return next_step

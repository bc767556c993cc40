"""THE loop: GRPO with adaptive entropy regularization, one rollout batch per step.

    prompts -> rollouts -> rewards -> (everything on every rank) Experience
        -> score: old log-probabilities and exact entropies under the policy that sampled
        -> assess: advantages, difficulty, the controller's observation -> controller update
        -> train: one or more optimizer steps -> publish the weights

Two values come back from a step to the next: ``controller_state`` and ``policy_version``; both are local variables of
``Trainer.run``. What persists beside them (data cursor, ledger, weights) belongs to the part that owns it.

This file decides when and in which order; stages.py says what a stage is, asynchronous.py is the other order. It does
NOT know torch, ranks, files or how any part works.
"""

from __future__ import annotations

from aer_megatron.algo import controller
from aer_megatron.loop.parts import Progress
from aer_megatron.loop.stages import Stages
from aer_megatron.report.metrics import Metric


class Trainer:
    """Runs steps ``start.next_step`` to ``config.run.num_steps - 1`` of the stages."""

    def __init__(self, stages: Stages) -> None:
        self._stages = stages

    def run(self) -> int:
        """Returns the next step once the last one is done, or the run was asked to stop, and all is saved."""
        stages, parts, config, start = self._stages, self._stages.parts, self._stages.config, self._stages.start
        entropy = config.algo.entropy
        next_step, controller_state, policy_version = start.next_step, start.controller_state, start.policy_version
        stages.publish(policy_version)

        for step in range(start.next_step, config.run.num_steps):
            eval_metrics = stages.evaluate(step)
            collected = stages.collect(stages.launch(step))
            experience = collected.experience
            stages.release_memory()

            scores = stages.score(step, experience)
            assessed = stages.assess(experience, scores, step, policy_version)
            # the controller sees this batch before its loss: a batch later the loop would be less damped (docs/aer.md)
            controller_state = controller.anchor(controller_state, entropy, assessed.observation)
            decision = controller.update(controller_state, entropy, assessed.observation)
            controller_state = decision.state
            coefficient = controller.loss_coefficient(
                controller_state, entropy, token_entropy=assessed.observation.token_mean
            )
            stats = stages.train(step, experience, scores, assessed, coefficient)
            stages.record_flight(step, decision, coefficient, assessed, stats)
            policy_version += 1
            stages.publish(policy_version)

            parts.reporter.step(
                {Metric.STEP: step}
                | stages.metrics(collected, assessed, decision, coefficient, stats)
                | eval_metrics
                | parts.timer.take(num_tokens=len(experience.token_ids_L))
            )
            next_step = step + 1
            if stages.end_step(Progress(next_step, policy_version, controller_state, parts.prompts.state_dict())):
                break
        stages.finish()
        return next_step

"""The asynchronous loop: the servers generate later batches while a batch is trained on.

    step n:   launch batches up to n + k | wait for batch n -> score -> assess -> controller -> train -> publish
    beside:   ... batch n | batch n + 1 | ... one after the other, going on over every publication

k is ``rollout.staleness``. Batch n is launched when the policy of step n - k or later is published, so none of its
tokens is more than k versions behind the policy that trains on it. A publication interrupts what is under way: those
completions keep their tokens and go on under the new weights (sglang/engine.py), so no publication waits for a
generation. The order of batches is the order of steps on every rank; only waiting for servers leaves the main thread.

What a stage is, and what the synchronous loop shares with this one, is in loop/stages.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from aer_megatron.algo import controller
from aer_megatron.loop.parts import Progress
from aer_megatron.loop.stages import Generate, Launch, Stages
from aer_megatron.report.metrics import Metric


class AsyncTrainer:
    """Runs steps ``start.next_step`` to ``config.run.num_steps - 1`` of the stages, generating ahead."""

    def __init__(self, stages: Stages) -> None:
        self._stages = stages

    def run(self) -> int:
        """Returns the next step once the last one is done, or the run was asked to stop, and all is saved.

        Rollouts that are under way then, or at an error, are left to the engine's ``close``.
        """
        stages, parts, config, start = self._stages, self._stages.parts, self._stages.config, self._stages.start
        entropy = config.algo.entropy
        next_step, controller_state, policy_version = start.next_step, start.controller_state, start.policy_version
        stages.publish(policy_version)

        with ExitStack() as stack:
            worker = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
            # not waited for: it may be in the middle of a generation, which ends when the engine is closed
            stack.callback(worker.shutdown, wait=False, cancel_futures=True)
            ahead: deque[Launch] = deque()
            for step in range(start.next_step, config.run.num_steps):
                eval_metrics = stages.evaluate(step)
                while len(ahead) <= config.rollout.staleness and step + len(ahead) < config.run.num_steps:
                    ahead.append(stages.launch(step + len(ahead), begin=_beginner(worker)))
                collected = stages.collect(ahead.popleft())
                experience = collected.experience

                scores = stages.score(step, experience)
                assessed = stages.assess(experience, scores, step, policy_version)
                assert assessed.staleness.largest <= config.rollout.staleness
                # of the forward pass just made, by the policy to be trained: stale rollouts give it only their tokens
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
                pending = tuple(launch.pending for launch in ahead)
                next_step = step + 1
                if stages.end_step(
                    Progress(next_step, policy_version, controller_state, parts.prompts.state_dict(), pending)
                ):
                    break
            stages.finish()
        return next_step


def _beginner(worker: ThreadPoolExecutor) -> Callable[[Generate], Generate]:
    """Returns what begins a generation at once, behind those begun before, and gives the way to wait for it."""
    return lambda work: worker.submit(work).result

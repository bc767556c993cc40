"""The phases of a training step, shared by the synchronous and the asynchronous loop: what happens in a step, not when.

    begin_rollouts (prompts, generation) -> collect (rewards, refills)
        -> policy_step: score -> assess -> controller -> train -> publish -> metrics
        -> end_step: checkpoint, or the end of the run

Nothing here remembers anything from one step to the next. This file does NOT know torch, ranks, files or how any part
works.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from aer_megatron.algo import controller
from aer_megatron.algo.advantage import AdvantageResult, group_advantages, group_verdicts, overlong_penalty
from aer_megatron.algo.controller import ControllerState, Decision, Observation
from aer_megatron.algo.difficulty import difficulty
from aer_megatron.algo.experience import Staleness, join_experiences, mixed_groups, num_groups, select_groups, staleness
from aer_megatron.algo.flight import BatchProfile, FlightRecord, profile_batch
from aer_megatron.algo.ledger import difficulty_accuracy, group_token_entropy, update_ledger
from aer_megatron.algo.mismatch import Mismatch, measure_mismatch
from aer_megatron.algo.selection import skip_decided
from aer_megatron.config import Config
from aer_megatron.loop.beside import beside
from aer_megatron.loop.evaluation import Finish, begin_evaluation, due_sets
from aer_megatron.loop.parts import Begin, Parts, PendingBatch, Progress, TrainedBatch, at_once, when_waited
from aer_megatron.report.metrics import Metric, reason_count
from aer_megatron.report.training import (
    controller_metrics,
    difficulty_metrics,
    engine_metrics,
    experience_metrics,
    training_metrics,
    user_metrics,
)
from aer_megatron.rewards.labels import bound_counts
from aer_megatron.types import (
    Experience,
    Float32Array,
    Float64Array,
    PolicyScores,
    Prompt,
    RolloutGroup,
    StepStats,
    TrainBatch,
)

Generate = Callable[[], list[RolloutGroup]]


@dataclass(frozen=True, slots=True)
class Rollouts:
    """Prompts whose rollouts are under way, or begin when they are waited for."""

    pending: PendingBatch
    num_groups: int  # wanted; prompts beyond them race (rollout.oversample)
    refill: int
    wait: Generate = field(repr=False)


@dataclass(frozen=True, slots=True)
class Collected:
    """The rollout batch of a step with what dynamic sampling and over-sampling did to it."""

    experience: Experience
    reasons: Mapping[str, int]
    reward_mean: float
    num_dropped: int
    num_refills: int
    num_skipped: int
    num_aborted: int
    num_generated: int  # sampled tokens, those of dropped groups too


@dataclass(frozen=True, slots=True)
class Assessment:
    """What the batch says before the update: advantages, where the bonus goes, what the controller sees."""

    advantages: AdvantageResult
    difficulty_P: Float64Array  # before normalisation
    allocation_P: Float64Array  # after it: multiplies the coefficient
    observation: Observation
    mismatch: Mismatch
    staleness: Staleness
    profile: BatchProfile


class Phases:
    """The phases over the parts of a run; ``start.pending`` are batches that an earlier launch had drawn."""

    def __init__(self, config: Config, parts: Parts, start: Progress) -> None:
        self.config = config
        self.parts = parts
        self.start = start
        self._resumed = {batch.step: batch for batch in start.pending}

    def evaluating(self) -> AbstractContextManager[Begin]:
        """Gives how evaluations begin: at once, or (``eval.overlap``) beside what follows."""
        return beside("evaluation") if self.config.eval.overlap else nullcontext(at_once)

    def begin_evaluation(self, step: int, begin: Begin) -> Finish:
        """Returns what gives the metrics of the sets that are due before ``step``, of the policy that is served now."""
        sets = due_sets(self.parts.rollouts.evaluation, step, num_steps=self.config.run.num_steps)
        return begin_evaluation(self.parts, sets, step, begin)

    def evaluate_last(self) -> None:
        """Evaluates the policy that the run ends with; its record, of step ``num_steps``, holds nothing else."""
        step = self.config.run.num_steps
        metrics = self.begin_evaluation(step, at_once)()
        if metrics:
            self.parts.reporter.step({Metric.STEP: step} | metrics | self.parts.timer.take())

    def begin_rollouts(self, step: int, begin: Begin = when_waited) -> Rollouts:
        """Returns the rollouts of a step's first round under way, as far as ``begin`` begins them.

        Ranks call it in the same order: it draws prompts.
        """
        return self._begin_rollouts(step, 0, self.config.rollout.prompts_per_step, begin)

    def collect(self, first: Rollouts) -> Collected:
        """Returns P groups; dynamic sampling replaces groups solved always or never, as far as max_refills allow."""
        options = self.config.rollout
        begun = [first]
        rounds: list[Experience] = []
        kept: list[Experience] = []
        spare: list[Experience] = []
        reasons: dict[str, int] = {}
        missing = options.prompts_per_step
        # rounds until enough groups are mixed, or no refill is left
        while True:
            experience, counts = self._roll_out(begun[-1])
            rounds.append(experience)
            for label, count in counts.items():
                reasons[label] = reasons.get(label, 0) + count
            if not options.dynamic_sampling:
                kept.append(experience)
                break
            keep_P = mixed_groups(group_verdicts(experience))
            kept.append(select_groups(experience, keep_P))
            spare.append(select_groups(experience, ~keep_P))
            missing -= int(keep_P.sum())
            if not missing or len(rounds) > options.max_refills:
                break
            begun.append(self._begin_rollouts(first.pending.step, len(rounds), missing, when_waited))
        if options.dynamic_sampling and missing:
            # the batch keeps its size: what is still missing is filled with groups of zero advantage
            unmixed = join_experiences(spare)
            kept.append(select_groups(unmixed, np.arange(num_groups(unmixed)) < missing))
        # what is trained is ``result``; reward and reasons are of everything that was generated
        result = join_experiences(kept)
        rewards = np.concatenate([part.reward_B for part in rounds])
        return Collected(
            experience=result,
            reasons=bound_counts(reasons),
            reward_mean=float(rewards.mean()),
            num_dropped=sum(num_groups(part) for part in rounds) - num_groups(result),
            num_refills=len(rounds) - 1,
            num_skipped=sum(item.pending.num_skipped for item in begun),
            num_aborted=sum(len(item.pending.prompt_ids) - item.num_groups for item in begun),
            num_generated=sum(part.num_sampled_tokens for part in rounds),
        )

    def policy_step(
        self,
        step: int,
        collected: Collected,
        controller_state: ControllerState,
        policy_version: int,
        evaluation: Finish,
    ) -> ControllerState:
        """Returns the controller's next state, after the policy learned from the batch and was published.

        Args:
            policy_version: that of the policy which is trained; it is published as the next one.
            evaluation: of the same policy, the one that the engine serves; waited for before another one is published.
        """
        experience = collected.experience
        scores = self.score(step, experience)
        assessed = self.assess(experience, scores, step, policy_version)
        # the controller sees this batch before its loss: a batch later the loop would be less damped (docs/adr/0002)
        decision = controller.step(controller_state, self.config.algo.entropy, assessed.observation)
        stats = self.train(step, experience, scores, assessed, decision.coefficient)
        self.record_flight(step, decision, assessed, stats)
        self.keep_samples(step, experience, scores, assessed, decision.coefficient)
        evaluated = evaluation()
        self.publish(policy_version + 1)
        metrics = self.metrics(collected, assessed, decision, stats)
        times = self.parts.timer.take(num_tokens=len(experience.token_ids_L))
        speeds = self.parts.throughput(times, experience, num_generated=collected.num_generated)
        self.parts.reporter.step({Metric.STEP: step} | metrics | evaluated | times | speeds)
        return decision.state

    def score(self, step: int, experience: Experience) -> PolicyScores:
        """Returns what the policy that is about to be trained says of the batch."""
        with self.parts.timer.phase("score"):
            return self.parts.policy.score(experience, seed=self.config.run.seed + step)

    def assess(self, experience: Experience, scores: PolicyScores, step: int, policy_version: int) -> Assessment:
        """Returns the assessment of the batch, after the ledger took its evidence.

        Raises:
            RuntimeError: at step 0, if rollout engine and trainer hold different policies (``rollout.logprob_gate``).
        """
        mismatch = measure_mismatch(scores.logprob_T, experience.rollout_logprob_T)
        if step == 0:
            mismatch.check_same_policy(self.config.rollout.logprob_gate)
        algo, ledger = self.config.algo, self.parts.ledger
        with self.parts.timer.phase("score"):
            advantages = group_advantages(experience, algo.advantage, penalty_B=self._penalty(experience))
            entropy_sum_P, token_count_P = group_token_entropy(experience, scores.token_entropy_T)
            update_ledger(ledger, advantages, entropy_sum_P=entropy_sum_P, token_count_P=token_count_P, step=step)
            accuracy_P = difficulty_accuracy(
                algo.entropy.source, advantages.accuracy_P, ledger, advantages.prompt_id_P, algo.ledger, step
            )
            difficulty_P = difficulty(accuracy_P, shape=algo.entropy.difficulty, rho=algo.entropy.rho)
            allocation_P = algo.entropy.allocation(difficulty_P)  # decides where the bonus goes
            return Assessment(
                advantages=advantages,
                difficulty_P=difficulty_P,
                allocation_P=allocation_P,
                # of the forward pass above: the policy that is trained, also where older ones sampled the tokens
                observation=Observation(
                    entropy_sum=float(scores.token_entropy_T.sum(dtype=np.float64)),
                    token_count=float(len(scores.token_entropy_T)),
                    difficulty_mean=float(difficulty_P.mean()),
                    mismatch_kl=mismatch.kl,
                ),
                mismatch=mismatch,
                staleness=staleness(experience, policy_version=policy_version),
                profile=profile_batch(experience, scores, advantages, allocation_P),
            )

    def train(
        self, step: int, experience: Experience, scores: PolicyScores, assessed: Assessment, coefficient: float
    ) -> StepStats:
        """Returns the statistics of the step's policy updates."""
        batch = TrainBatch(
            experience=experience,
            advantage_B=assessed.advantages.advantage_B,
            entropy_weight_B=coefficient * assessed.allocation_P[experience.group_index_B],
            old_logprob_T=scores.logprob_T,
            ref_logprob_T=self._score_reference(experience),
        )
        with self.parts.timer.phase("train"):
            return self.parts.policy.train(
                batch,
                seed=self.config.run.seed + step,
                entropy_gradient=self.config.algo.entropy.acts,
            )

    def publish(self, policy_version: int) -> None:
        """Makes the rollout engine serve the policy as ``policy_version``."""
        with self.parts.timer.phase("sync"):
            self.parts.rollouts.weight_sync.publish(self.parts.policy.hf_weights(), policy_version)

    def release_memory(self) -> None:
        """Has servers that share the trainer's GPUs give their memory back, where the run wants it."""
        if self.config.sglang.release_memory:
            with self.parts.timer.phase("sync"):
                self.parts.rollouts.weight_sync.suspend()

    def record_flight(self, step: int, decision: Decision, assessed: Assessment, stats: StepStats) -> None:
        """Writes what the controller saw and did, so that any other can be replayed on it."""
        if self.parts.flight is None:
            return
        advantages, algo = assessed.advantages, self.config.algo
        self.parts.flight.write(
            FlightRecord(
                step=step,
                observation=assessed.observation,
                state=decision.state,
                coefficient=decision.coefficient,
                successes_P=advantages.successes_P,
                counts_P=advantages.counts_P,
                ledger_accuracy_P=difficulty_accuracy(
                    "ledger", advantages.accuracy_P, self.parts.ledger, advantages.prompt_id_P, algo.ledger, step
                ),
                profile=assessed.profile,
                clip_low=stats.sums["clip_low"],
                clip_high=stats.sums["clip_high"],
            )
        )

    def keep_samples(
        self, step: int, experience: Experience, scores: PolicyScores, assessed: Assessment, coefficient: float
    ) -> None:
        """Keeps some groups of the batch, with what was known of their tokens before the update."""
        weight_B = coefficient * assessed.allocation_P[experience.group_index_B]
        advantage_B = assessed.advantages.advantage_B
        batch = TrainedBatch(experience, scores, advantage_B, assessed.difficulty_P, weight_B)
        self.parts.samples.trained(step, batch)

    def metrics(
        self, collected: Collected, assessed: Assessment, decision: Decision, stats: StepStats
    ) -> dict[str, Any]:
        """Returns every metric of a step but those of evaluation and time; ``stats`` are the update's."""
        experience, algo = collected.experience, self.config.algo
        penalty_B = self._penalty(experience)
        shaping = {} if penalty_B is None else {Metric.REWARD_OVERLONG_PENALTY: float(penalty_B.mean())}
        skips = self.config.run.on_nonfinite == "skip"
        skipped = {Metric.TRAIN_UPDATES_SKIPPED: stats.updates_skipped} if skips else {}
        return (
            {
                Metric.AER_COEFFICIENT: decision.coefficient,
                Metric.REWARD_MEAN: collected.reward_mean,
                Metric.ROLLOUT_GROUPS_DROPPED: collected.num_dropped,
                Metric.ROLLOUT_GROUPS_ABORTED: collected.num_aborted,
                Metric.ROLLOUT_REFILLS: collected.num_refills,
                Metric.DATA_PROMPTS_SKIPPED: collected.num_skipped,
                Metric.CHECKPOINT_FAILED: self.parts.saves.num_failed,
            }
            | {reason_count(label): count for label, count in collected.reasons.items()}
            | shaping
            | skipped
            | experience_metrics(experience)
            | engine_metrics(assessed.mismatch, assessed.staleness)
            | controller_metrics(decision, assessed.observation, assessed.advantages)
            | difficulty_metrics(assessed.profile, decision.coefficient)
            | training_metrics(stats, kl_coefficient=algo.kl_coefficient)
            | user_metrics(algo.reports, {**stats.sums, **assessed.advantages.reported, **decision.reported})
        )

    def end_step(self, progress: Progress) -> bool:
        """Returns whether the run ends here: after the last step, or because it was asked to.

        A checkpoint is begun at checkpoint steps and wherever the run ends; ``finish`` waits for it.
        """
        run, done = self.config.run, progress.next_step
        last = done == run.num_steps
        due = last or bool(run.checkpoint_every and done % run.checkpoint_every == 0)
        if due:
            self._save(progress)
        self.parts.export(done)
        if last or not self.parts.stop_requested():  # asked behind the save: that one may take long
            return last
        if not due:
            self._save(progress)
        return True

    def finish(self) -> None:
        """Waits until the last checkpoint that was begun is on disk; raises RuntimeError where it cannot be."""
        with self.parts.timer.phase("checkpoint"):
            self.parts.saves.finish()

    def _save(self, progress: Progress) -> None:
        with self.parts.timer.phase("checkpoint"):
            self.parts.samples.flush()  # a resumed run makes those of later steps again, and no others
            self.parts.saves.save(progress)

    def _begin_rollouts(self, step: int, refill: int, num_groups: int, begin: Begin) -> Rollouts:
        resumed = None if refill else self._resumed.get(step)
        if resumed is not None:
            prompts, num_skipped = self.parts.prompts.prompts_of(resumed.prompt_ids), resumed.num_skipped
        else:
            prompts, num_skipped = self._choose(_with_spares(num_groups, self.config.rollout.oversample), step)
        work = partial(self.parts.rollouts.collector.collect, prompts, step=step, refill=refill, num_groups=num_groups)
        ids = tuple(prompt.id for prompt in prompts)
        return Rollouts(PendingBatch(step, ids, num_skipped), num_groups, refill, begin(work))

    def _choose(self, count: int, step: int) -> tuple[list[Prompt], int]:
        """Returns (the next ``count`` prompts, how many were passed over because the ledger knows their outcome)."""
        parts, algo = self.parts, self.config.algo
        if algo.selection.kind == "none":
            return parts.prompts.next_prompts(count), 0
        seed, prior = self.config.run.seed, algo.ledger
        skip = partial(skip_decided, parts.ledger, selection=algo.selection, prior=prior, seed=seed, step=step)
        return parts.prompts.select_prompts(
            count, accept=lambda ids: ~skip(ids), max_rejected=count * algo.selection.max_rejections
        )

    def _roll_out(self, rollouts: Rollouts) -> tuple[Experience, dict[str, int]]:
        parts = self.parts
        with parts.timer.phase("rollout"):
            groups = rollouts.wait()
        with parts.timer.phase("reward"):
            scored = parts.rollouts.score_groups(groups)
            parts.samples.generated(scored)
            return parts.rollouts.gather(scored)

    def _penalty(self, experience: Experience) -> Float64Array | None:
        return overlong_penalty(experience, self.config.algo, max_new_tokens=self.config.rollout.max_new_tokens)

    def _score_reference(self, experience: Experience) -> Float32Array | None:
        if not self.config.algo.kl_coefficient:
            return None
        with self.parts.timer.phase("score"):
            return self.parts.policy.score_reference(experience)


def _with_spares(num_groups: int, oversample: float) -> int:
    return math.ceil(num_groups * oversample - 1e-9)  # 10 * 1.1 is 11, not 12

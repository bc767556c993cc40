"""THE loop: GRPO with adaptive entropy regularization, one rollout batch per step.

    prompts -> rollouts -> rewards -> (everything on every rank) Experience
        -> score: old log-probabilities and exact entropies under the policy that sampled
        -> assess: advantages, difficulty, the controller's observation -> controller update
        -> train: one or more optimizer steps -> publish the weights

Two values come back from a step to the next: ``controller_state`` and ``policy_version``; both are local variables of
``Trainer.run``. What persists beside them (data cursor, ledger, weights) belongs to the part that owns it.

This file decides when and in which order. It does NOT know torch, ranks, files or how any part works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np

from aer_megatron._C import DifficultyLedger
from aer_megatron.algo import controller
from aer_megatron.algo.advantage import AdvantageResult, group_advantages, overlong_penalty
from aer_megatron.algo.controller import ControllerState, Decision, Observation
from aer_megatron.algo.difficulty import (
    difficulty,
    difficulty_accuracy,
    group_token_entropy,
    normalize_difficulty,
    update_ledger,
)
from aer_megatron.algo.experience import (
    join_experiences,
    logprob_difference,
    mixed_groups,
    num_groups,
    select_groups,
)
from aer_megatron.algo.flight import BatchProfile, FlightRecord, profile_batch
from aer_megatron.algo.passk import pass_at_k
from aer_megatron.algo.selection import skip_decided
from aer_megatron.config import Config
from aer_megatron.report.metrics import Metric, pass_at, reason_count
from aer_megatron.report.reporter import StepReporter
from aer_megatron.report.timer import PhaseTimer
from aer_megatron.report.training import controller_metrics, difficulty_metrics, training_metrics
from aer_megatron.types import (
    Experience,
    Float32Array,
    Float64Array,
    PolicyScores,
    Prompt,
    RolloutGroup,
    ScoredGroup,
    StepStats,
    TrainBatch,
)


class PromptSource(Protocol):
    def next_prompts(self, count: int) -> list[Prompt]: ...
    def select_prompts(
        self, count: int, *, accept: Callable[[Any], Any], max_rejected: int
    ) -> tuple[list[Prompt], int]: ...
    def state_dict(self) -> dict[str, int]: ...


class Collector(Protocol):
    def collect(self, prompts_P: Sequence[Prompt], *, step: int, refill: int) -> list[RolloutGroup]: ...


class Policy(Protocol):
    def score(self, experience: Experience) -> PolicyScores: ...
    def score_reference(self, experience: Experience) -> Float32Array: ...
    def train(self, batch: TrainBatch, *, seed: int, entropy_gradient: bool) -> StepStats: ...
    def hf_weights(self) -> Iterator[tuple[str, Any]]: ...


class WeightSync(Protocol):
    def publish(self, named_tensors: Iterator[tuple[str, Any]], version: int) -> None: ...


class FlightRecorder(Protocol):
    def write(self, record: FlightRecord) -> None: ...


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands between two steps: what a checkpoint holds beside weights, optimizer and ledger."""

    next_step: int
    policy_version: int
    controller_state: ControllerState
    cursor: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Parts:
    """What train.py chose for this run."""

    prompts: PromptSource
    eval_prompts: Sequence[Prompt]
    collector: Collector
    eval_collector: Collector
    score_groups: Callable[[list[RolloutGroup]], list[ScoredGroup]]
    gather: Callable[[list[ScoredGroup]], tuple[Experience, dict[str, int]]]
    policy: Policy
    weight_sync: WeightSync
    ledger: DifficultyLedger
    save: Callable[[Progress], None]
    flight: FlightRecorder | None  # on one rank, where the run has a recorder
    reporter: StepReporter
    timer: PhaseTimer


@dataclass(frozen=True, slots=True)
class Collected:
    """The rollout batch of a step with what dynamic sampling did to it."""

    experience: Experience
    reasons: Mapping[str, int]
    reward_mean: float
    num_dropped: int
    num_refills: int
    num_skipped: int


@dataclass(frozen=True, slots=True)
class Assessment:
    """What the batch says before the update: advantages, where the bonus goes, what the controller sees."""

    advantages: AdvantageResult
    difficulty_P: Float64Array  # before normalisation
    allocation_P: Float64Array  # after it: multiplies the coefficient
    observation: Observation
    profile: BatchProfile


class Trainer:
    """Runs steps ``start.next_step`` to ``config.run.num_steps - 1``."""

    def __init__(self, config: Config, parts: Parts, start: Progress) -> None:
        self._config = config
        self._parts = parts
        self._start = start

    def run(self) -> None:
        """Returns when the last step is done and saved."""
        parts, config, timer = self._parts, self._config, self._parts.timer
        entropy = config.algo.entropy
        controller_state, policy_version = self._start.controller_state, self._start.policy_version
        parts.weight_sync.publish(parts.policy.hf_weights(), policy_version)

        for step in range(self._start.next_step, config.run.num_steps):
            eval_metrics = self._evaluate(step) if self._is_eval_step(step) else {}
            collected = self._collect(step)
            experience = collected.experience

            with timer.phase("score"):
                scores = parts.policy.score(experience)
                assessed = self._assess(experience, scores, step)
            self._check_mismatch(step, experience, scores)
            # the controller sees this batch before its loss: a batch later the loop would be less damped (docs/aer.md)
            controller_state = controller.anchor(controller_state, assessed.observation)
            decision = controller.update(controller_state, entropy, assessed.observation)
            controller_state = decision.state
            coefficient = controller.loss_coefficient(
                controller_state, entropy, token_entropy=assessed.observation.token_mean
            )
            batch = TrainBatch(
                experience=experience,
                advantage_B=assessed.advantages.advantage_B,
                entropy_weight_B=coefficient * assessed.allocation_P[experience.group_index_B],
                old_logprob_T=scores.logprob_T,
                ref_logprob_T=self._score_reference(experience),
            )
            with timer.phase("train"):
                stats = parts.policy.train(
                    batch,
                    seed=config.run.seed + step,
                    entropy_gradient=controller.needs_entropy_gradient(entropy),
                )
            self._record_flight(step, decision, coefficient, assessed, stats)
            policy_version += 1
            with timer.phase("sync"):
                parts.weight_sync.publish(parts.policy.hf_weights(), policy_version)

            parts.reporter.step(
                {Metric.STEP: step, Metric.AER_COEFFICIENT: coefficient}
                | self._rollout_metrics(collected, scores)
                | controller_metrics(decision, entropy, assessed.observation, assessed.advantages)
                | difficulty_metrics(assessed.profile, coefficient)
                | training_metrics(stats, kl_coefficient=config.algo.kl_coefficient)
                | eval_metrics
                | timer.take(num_tokens=len(experience.token_ids_L))
            )
            if self._is_save_step(step):
                with timer.phase("checkpoint"):
                    parts.save(Progress(step + 1, policy_version, controller_state, parts.prompts.state_dict()))

    def _collect(self, step: int) -> Collected:
        """Returns P groups; dynamic sampling replaces groups solved always or never, as far as max_refills allow."""
        options = self._config.rollout
        rounds: list[Experience] = []
        kept: list[Experience] = []
        spare: list[Experience] = []
        reasons: dict[str, int] = {}
        num_skipped, missing = 0, options.prompts_per_step
        while missing and len(rounds) <= options.max_refills:
            prompts, skipped = self._choose(missing, step)
            experience, counts = self._roll_out(prompts, step, len(rounds))
            rounds.append(experience)
            num_skipped += skipped
            for label, count in counts.items():
                reasons[label] = reasons.get(label, 0) + count
            if not options.dynamic_sampling:
                kept.append(experience)
                break
            keep_P = mixed_groups(group_advantages(experience, self._config.algo))
            kept.append(select_groups(experience, keep_P))
            spare.append(select_groups(experience, ~keep_P))
            missing -= int(keep_P.sum())
        if options.dynamic_sampling and missing:
            # the batch keeps its size: what is still missing is filled with groups of zero advantage
            unmixed = join_experiences(spare)
            kept.append(select_groups(unmixed, np.arange(num_groups(unmixed)) < missing))
        result = join_experiences(kept)
        rewards = np.concatenate([part.reward_B for part in rounds])
        return Collected(
            experience=result,
            reasons=reasons,
            reward_mean=float(rewards.mean()),
            num_dropped=sum(num_groups(part) for part in rounds) - num_groups(result),
            num_refills=len(rounds) - 1,
            num_skipped=num_skipped,
        )

    def _choose(self, count: int, step: int) -> tuple[list[Prompt], int]:
        """Returns (the next ``count`` prompts, how many were passed over because the ledger knows their outcome)."""
        parts, algo = self._parts, self._config.algo
        if algo.selection.kind == "none":
            return parts.prompts.next_prompts(count), 0
        skip = partial(
            skip_decided,
            parts.ledger,
            selection=algo.selection,
            prior=algo.ledger,
            seed=self._config.run.seed,
            step=step,
        )
        return parts.prompts.select_prompts(
            count, accept=lambda ids: ~skip(ids), max_rejected=count * algo.selection.max_rejections
        )

    def _roll_out(self, prompts: list[Prompt], step: int, refill: int) -> tuple[Experience, dict[str, int]]:
        parts = self._parts
        with parts.timer.phase("rollout"):
            groups = parts.collector.collect(prompts, step=step, refill=refill)
        with parts.timer.phase("reward"):
            return parts.gather(parts.score_groups(groups))

    def _assess(self, experience: Experience, scores: PolicyScores, step: int) -> Assessment:
        algo, ledger = self._config.algo, self._parts.ledger
        advantages = group_advantages(experience, algo, penalty_B=self._penalty(experience))
        entropy_sum_P, token_count_P = group_token_entropy(experience, scores.token_entropy_T)
        update_ledger(ledger, advantages, entropy_sum_P=entropy_sum_P, token_count_P=token_count_P, step=step)
        accuracy_P = difficulty_accuracy(
            algo.entropy.source, advantages.accuracy_P, ledger, advantages.prompt_id_P, algo.ledger, step
        )
        difficulty_P = difficulty(accuracy_P, shape=algo.entropy.difficulty, rho=algo.entropy.rho)
        allocation_P = self._allocation(difficulty_P)
        return Assessment(
            advantages=advantages,
            difficulty_P=difficulty_P,
            allocation_P=allocation_P,
            observation=Observation(
                entropy_sum=float(scores.token_entropy_T.sum(dtype=np.float64)),
                token_count=float(len(scores.token_entropy_T)),
                difficulty_mean=float(difficulty_P.mean()),
            ),
            profile=profile_batch(experience, scores, advantages, allocation_P),
        )

    def _penalty(self, experience: Experience) -> Float64Array | None:
        max_new_tokens = self._config.rollout.max_new_tokens
        return overlong_penalty(experience, self._config.algo, max_new_tokens=max_new_tokens)

    def _score_reference(self, experience: Experience) -> Float32Array | None:
        if not self._config.algo.kl_coefficient:
            return None
        with self._parts.timer.phase("score"):
            return self._parts.policy.score_reference(experience)

    def _allocation(self, difficulty_P: Float64Array) -> Float64Array:
        """Difficulty decides where the bonus goes under ``aer``; the baselines spread it evenly."""
        entropy = self._config.algo.entropy
        if entropy.kind != "aer":
            return np.ones_like(difficulty_P)
        return normalize_difficulty(difficulty_P, mode=entropy.normalize, floor=entropy.difficulty_floor)

    def _record_flight(
        self, step: int, decision: Decision, coefficient: float, assessed: Assessment, stats: StepStats
    ) -> None:
        """Writes what the controller saw and did, so that any other can be replayed on it."""
        if self._parts.flight is None:
            return
        advantages, algo = assessed.advantages, self._config.algo
        self._parts.flight.write(
            FlightRecord(
                step=step,
                observation=assessed.observation,
                state=decision.state,
                coefficient=coefficient,
                successes_P=advantages.successes_P,
                counts_P=advantages.counts_P,
                ledger_accuracy_P=difficulty_accuracy(
                    "ledger", advantages.accuracy_P, self._parts.ledger, advantages.prompt_id_P, algo.ledger, step
                ),
                profile=assessed.profile,
                clip_low=stats.sums["clip_low"],
                clip_high=stats.sums["clip_high"],
            )
        )

    def _evaluate(self, step: int) -> dict[str, float]:
        parts, options = self._parts, self._config.eval
        with parts.timer.phase("eval"):
            groups = parts.eval_collector.collect(parts.eval_prompts, step=step, refill=0)
            experience, _ = parts.gather(parts.score_groups(groups))
        result = group_advantages(experience, self._config.algo)
        metrics = {
            pass_at(k): float(pass_at_k(result.counts_P, result.successes_P, k=k).mean()) for k in options.k
        }
        return metrics | {Metric.EVAL_RESPONSE_LENGTH_MEAN: float(experience.response_length_B.mean())}

    def _is_eval_step(self, step: int) -> bool:
        every, last = self._config.run.eval_every, self._config.run.num_steps - 1
        return bool(every) and (step % every == 0 or step == last)

    def _is_save_step(self, step: int) -> bool:
        every, last = self._config.run.checkpoint_every, self._config.run.num_steps - 1
        return step == last or (bool(every) and (step + 1) % every == 0)

    def _check_mismatch(self, step: int, experience: Experience, scores: PolicyScores) -> None:
        """Refuses to train on a policy that is not the one that sampled: wrong weights, temperature or positions."""
        gate = self._config.rollout.logprob_gate
        if step or not gate:
            return
        difference, _ = logprob_difference(experience, scores.logprob_T)
        if not difference <= gate:
            raise RuntimeError(
                f"at step 0 the rollout engine and the trainer differ by {difference:.3g} nats in a sampled token's "
                f"log-probability, more than rollout.logprob_gate={gate}: they do not hold the same policy (weights, "
                "temperature, dtype); raise the gate for bf16, or look for the cause"
            )

    def _rollout_metrics(self, collected: Collected, scores: PolicyScores) -> dict[str, Any]:
        experience = collected.experience
        difference_max, difference_sum = logprob_difference(experience, scores.logprob_T)
        penalty_B = self._penalty(experience)
        shaping = {} if penalty_B is None else {Metric.REWARD_OVERLONG_PENALTY: float(penalty_B.mean())}
        return shaping | {
            Metric.REWARD_MEAN: collected.reward_mean,
            Metric.ROLLOUT_LOGPROB_DIFF_MAX: difference_max,
            Metric.ROLLOUT_LOGPROB_DIFF_MEAN: difference_sum / max(1, experience.num_response_tokens),
            Metric.ROLLOUT_RESPONSE_LENGTH_MEAN: float(experience.response_length_B.mean()),
            Metric.ROLLOUT_TRUNCATED_SHARE: float(experience.truncated_B.mean()),
            Metric.ROLLOUT_PROMPT_TOKENS: int(experience.prompt_length_B.sum()),
            Metric.ROLLOUT_RESPONSE_TOKENS: experience.num_response_tokens,
            Metric.ROLLOUT_GROUPS_DROPPED: collected.num_dropped,
            Metric.ROLLOUT_REFILLS: collected.num_refills,
            Metric.DATA_PROMPTS_SKIPPED: collected.num_skipped,
        } | {reason_count(label): count for label, count in collected.reasons.items()}

"""Frozen records that pass between the stages of one training step, one record per stage.

    Prompt --rollout--> RolloutGroup --rewards--> ScoredGroup --exchange--> Experience --score--> PolicyScores
                                                                                |
                                              TrainBatch <--advantages, entropy weights--+

A record is never edited: a stage that knows more makes the next record. Arrays are NumPy, ragged data is
concatenated ("packed") with one length per sequence.

A sequence is a prompt and a response. The policy sampled the response, or parts of it: a tool may speak in between.
Loss, entropy, ratio, difficulty and mismatch are over sampled tokens; the rest of a sequence is context.

Shape suffixes: P prompts, G rollouts per prompt, B sequences (B = P * G), T packed sampled tokens,
L packed prompt + response tokens.

This file does NOT hold behaviour, defaults or anything that needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Int64Array = NDArray[np.int64]
UInt64Array = NDArray[np.uint64]
Float32Array = NDArray[np.float32]
Float64Array = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One problem, ready to be answered.

    Example: ``Prompt(id=0x9AE1, problem="3,5,2,8=24>", token_ids=(4, 1, 6), answer="24", verifier="countdown")``
    """

    id: int  # unsigned 64-bit, stable across runs: it keys the difficulty ledger
    problem: str
    token_ids: tuple[int, ...]
    answer: str
    verifier: str  # a name registered in rewards/, or "package.module:function"
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Tokens [start, end) of a completion were sampled from policy ``version``."""

    version: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer: ids in, ids out, nothing re-tokenised.

    ``policy_versions`` says, in order, which tokens were sampled: all of a single-turn answer. What lies outside of
    every span (a tool's output) is context: it has no version and no log-probability and is not trained on.
    ``logprobs[t]`` is log pi(t-th sampled token | ...) of softmax(logits / temperature), before top-p/top-k truncation,
    natural logarithm. The end-of-sequence token, where one was sampled, is part of ``token_ids``.

    Example: ``Completion((9, 7, 1), (-0.11, -0.92, -0.01), "stop", (VersionSpan(4, 0, 3),))``, and with a tool that
    said 5 6 after the first token: ``Completion((9, 5, 6, 7, 1), (-0.11, -0.92, -0.01), "stop", (VersionSpan(4, 0, 1),
    VersionSpan(4, 3, 5)))``
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    policy_versions: tuple[VersionSpan, ...]


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """One prompt with its G completions."""

    prompt: Prompt
    completions: tuple[Completion, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """A verifier's word on one completion.

    Example: ``Verdict(reward=0.0, reason="no_answer")``; reasons are short snake_case labels that are counted.
    """

    reward: float
    reason: str


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """A rollout group with one verdict per completion, in the same order."""

    group: RolloutGroup
    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True, slots=True)
class PackedSequences:
    """The tokens of a batch: each sequence is a prompt and a response.

    ``sampled_L`` is true where the policy sampled the token (in a supervised batch: where it carries loss), at least
    once in every response and never in a prompt. None is what single-turn answers have: every response token.

    Example with two sequences (prompts 5 6, responses 7 1 and 8 9 1): ``prompt_length_B=[2 2], response_length_B=[2 3],
    token_ids_L=[5 6 7 1 5 6 8 9 1]``; had a tool said the 9: ``sampled_L=[0 0 1 1 0 0 1 0 1], sampled_length_B=[2 2]``.
    """

    prompt_length_B: Int64Array
    response_length_B: Int64Array
    token_ids_L: Int64Array
    sampled_L: BoolArray | None = field(default=None, kw_only=True)

    @property
    def num_sequences(self) -> int:
        return int(self.prompt_length_B.shape[0])

    @property
    def length_B(self) -> Int64Array:
        """Tokens of each sequence, its prompt and its response."""
        return self.prompt_length_B + self.response_length_B

    @property
    def sampled_length_B(self) -> Int64Array:
        """How many tokens of each response were sampled: their sum is T."""
        if self.sampled_L is None:
            return self.response_length_B
        return np.add.reduceat(self.sampled_L, np.cumsum(self.length_B) - self.length_B, dtype=np.int64)

    @property
    def num_sampled_tokens(self) -> int:
        """T, the tokens of all responses that were sampled."""
        return int((self.response_length_B if self.sampled_L is None else self.sampled_L).sum())


@dataclass(frozen=True, slots=True)
class Experience(PackedSequences):
    """The whole rollout batch of a step, identical on every rank: groups in prompt order, rollouts adjacent."""

    prompt_id_B: UInt64Array
    group_index_B: Int64Array  # 0..P-1
    rollout_logprob_T: Float32Array
    reward_B: Float64Array
    truncated_B: BoolArray
    policy_version_B: Int64Array  # the oldest version that produced a token of the sequence
    policy_version_sum_B: Int64Array  # the sum of its sampled tokens' versions


@dataclass(frozen=True, slots=True)
class PolicyScores:
    """What one forward pass of the training policy says of an ``Experience``: the same on every rank.

    ``token_entropy_T`` is the exact full-vocabulary entropy in nats at the rollout temperature.
    """

    logprob_T: Float32Array
    token_entropy_T: Float32Array
    # geometry of the gradients in x = logits / T, where they were asked for: squared norms and the dot product
    logprob_grad_sq_T: Float32Array | None = None  # |d logprob / dx|^2
    entropy_grad_sq_T: Float32Array | None = None  # |d token_entropy / dx|^2
    grad_dot_T: Float32Array | None = None


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """Everything the policy update needs; the coefficients are data, the loss reads no global.

    ``entropy_weight_B[i]`` is alpha * d(q_i); ``advantage_B`` is per sequence; ``old_logprob_T`` is the log-probability
    under the policy at the start of the step, ``ref_logprob_T`` that under the reference policy, where the loss has a
    KL to one.
    """

    experience: Experience
    advantage_B: Float64Array
    entropy_weight_B: Float64Array
    old_logprob_T: Float32Array
    ref_logprob_T: Float32Array | None = None


@dataclass(frozen=True, slots=True)
class SupervisedBatch(PackedSequences):
    """Prompt/response pairs for the supervised stage; only response tokens carry loss."""


@dataclass(frozen=True, slots=True)
class StepStats:
    """Sums over the global batch of one policy update, each with its count: never means.

    ``sums[name] = (sum, count)`` in float64. Example: ``{"loss": (-0.41, 1), "clip_low": (12.0, 6144)}``.
    """

    sums: Mapping[str, tuple[float, float]]
    grad_norm: float
    learning_rate: float
    updates_skipped: int = 0  # not finite: neither applied nor in the sums

    def mean(self, name: str) -> float:
        total, count = self.sums[name]
        return total / count if count else float("nan")

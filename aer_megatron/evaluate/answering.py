"""Samples and judges the answers of evaluation sets, chunk by chunk, on all ranks.

A sample is a function of the policy, the problem, its number and the sampling options: its seed is a hash of set,
problem and number, and a chunk has the same problems whether the evaluation was interrupted or not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aer_megatron.evaluate.samples import Place
from aer_megatron.parallel.agreement import exchange_json
from aer_megatron.parallel.platform import Platform
from aer_megatron.rewards.answer_classes import classify_answers
from aer_megatron.rewards.pool import VerifierPool
from aer_megatron.rewards.scoring import score_groups
from aer_megatron.rollout.collect import share
from aer_megatron.rollout.engine import GenerateRequest, RolloutEngine, SamplingOptions
from aer_megatron.rollout.seeds import derive_seed
from aer_megatron.types import Prompt, RolloutGroup, ScoredGroup


@dataclass(frozen=True, slots=True)
class Question:
    """A set at one temperature."""

    name: str
    key: str  # of all that decides the samples and their verdicts
    prompts: Sequence[Prompt]
    sampling: SamplingOptions
    num_samples: int
    max_new_tokens: int
    stream_seed: int
    k: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Answering:
    """What answers and judges: ``chunk`` samples are under way together on a rank."""

    engine: RolloutEngine
    pool: VerifierPool
    decode: Callable[[Sequence[int]], str]
    platform: Platform
    chunk: int

    def rows(self, question: Question, done: Callable[[Place], bool]) -> Iterator[list[dict[str, Any]]]:
        """Yields the lines of one chunk of problems after the other, the same on every rank.

        A chunk of which all is ``done`` is left out. Every rank calls it with the same arguments.
        """
        occurrence_P = _occurrences(question.prompts)
        for chunk in self._chunks(question):
            if all(done((question.key, index)) for index in chunk):
                continue
            own = chunk[share(len(chunk), rank=self.platform.rank, world_size=self.platform.world_size)]
            requests = [
                _request(question, question.prompts[index], occurrence_P[index], sample)
                for index in own
                for sample in range(question.num_samples)
            ]
            completions = self.engine.generate(requests, question.sampling)
            size = question.num_samples
            groups = [
                RolloutGroup(question.prompts[index], tuple(completions[place * size : (place + 1) * size]))
                for place, index in enumerate(own)
            ]
            scored = score_groups(groups, self.decode, self.pool)
            classes = classify_answers(scored, self.decode, self.pool)
            lines = [
                _row(question, index, group, None if found is None else (list(found.sizes), found.right))
                for index, group, found in zip(own, scored, classes, strict=True)
            ]
            yield [line for rank in exchange_json(lines, device=self.platform.device) for line in rank]

    def _chunks(self, question: Question) -> Iterator[list[int]]:
        """Yields the problems in chunks, prompts of a length together: equal lengths are not padded."""
        order = sorted(range(len(question.prompts)), key=lambda index: len(question.prompts[index].token_ids))
        size = max(1, self.chunk // question.num_samples) * self.platform.world_size
        for number in range(math.ceil(len(order) / size)):
            yield order[number * size : (number + 1) * size]


def _request(question: Question, prompt: Prompt, occurrence: int, sample: int) -> GenerateRequest:
    seed = derive_seed(question.stream_seed, prompt.id, occurrence, sample)
    return GenerateRequest(prompt.token_ids, seed, question.max_new_tokens)


def _row(
    question: Question, index: int, scored: ScoredGroup, classes: tuple[list[int], int | None] | None
) -> dict[str, Any]:
    samples = [
        {
            "token_ids": list(completion.token_ids),
            "reward": verdict.reward,
            "reason": verdict.reason,
            "truncated": completion.finish_reason == "length",
        }
        for completion, verdict in zip(scored.group.completions, scored.verdicts, strict=True)
    ]
    sizes, right = classes or (None, None)
    return {
        "key": question.key,
        "set": question.name,
        "temperature": question.sampling.temperature,
        "index": index,
        "id": f"{scored.group.prompt.id:016x}",
        "samples": samples,
        "classes": sizes,
        "right": right,
    }


def _occurrences(prompts: Sequence[Prompt]) -> Mapping[int, int]:
    """Returns, by index, how many earlier prompts have the same id: a problem that stands twice is answered afresh."""
    seen: dict[int, int] = {}
    found: dict[int, int] = {}
    for index, prompt in enumerate(prompts):
        found[index] = seen.get(prompt.id, 0)
        seen[prompt.id] = found[index] + 1
    return found

"""Rollout groups of this rank's share of a prompt batch, with seeds that no rank layout can change.

Shape suffixes: P prompts, G rollouts per prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

from aer_megatron.rollout.engine import GenerateRequest, RacingEngine, RolloutEngine, SamplingOptions
from aer_megatron.rollout.seeds import derive_seed
from aer_megatron.types import Completion, Prompt, RolloutGroup


def share(num_items: int, *, rank: int, world_size: int) -> slice:
    """Returns the contiguous part of ``num_items`` that ``rank`` owns; the first ranks get one more if it is
    uneven.

    Example: 5 items on 2 ranks: ``slice(0, 3)`` and ``slice(3, 5)``.

    Raises:
        ValueError: ``rank`` is not one of ``world_size`` ranks.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} must lie in 0..{world_size - 1}; pass this process's own rank")
    size, extra = divmod(num_items, world_size)
    start = rank * size + min(rank, extra)
    return slice(start, start + size + (rank < extra))


class RolloutCollector:
    """Turns the prompts of a step into rollout groups with an engine.

    Training and evaluation use one collector each, with their own ``stream_seed`` and ``num_samples``.

    Args:
        engine: generates the completions.
        options: sampling options of every request.
        num_samples: G, completions per prompt.
        max_new_tokens: of every completion.
        stream_seed: ``seeds.stream_seed(run_seed, "train")`` or ``"eval"``.
        rank, world_size: this process among all that generate.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        options: SamplingOptions,
        *,
        num_samples: int,
        max_new_tokens: int,
        stream_seed: int,
        rank: int,
        world_size: int,
    ) -> None:
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples} must be at least 1; raise it")
        self._engine = engine
        self._options = options
        self._num_samples = num_samples
        self._max_new_tokens = max_new_tokens
        self._stream_seed = stream_seed
        self._rank = rank
        self._world_size = world_size

    def collect(
        self, prompts_P: Sequence[Prompt], *, step: int, refill: int, num_groups: int | None = None
    ) -> list[RolloutGroup]:
        """Returns this rank's share of ``num_groups`` groups, in prompt order.

        With more prompts than that, each rank generates for its share of them until its share of the groups is whole,
        and gives up the others. Which ones win depends on the servers' speed: the seeds stay, the batch does not.

        Every rank passes the same whole batch: the seed of a rollout is a hash of (stream, step, refill,
        prompt id, which occurrence of the prompt in the batch, rollout index), so the union over ranks is the
        same for any number of ranks, and a prompt drawn twice is answered twice afresh.

        Args:
            prompts_P: the rollout batch of all ranks.
            step: the training step.
            refill: 0, or the number of the refill round that dynamic sampling is in.
            num_groups: of all ranks; None = one for every prompt.

        Raises:
            ValueError: ``num_groups`` is larger than the number of prompts.
        """
        num_groups = len(prompts_P) if num_groups is None else num_groups
        if num_groups > len(prompts_P):
            raise ValueError(f"num_groups={num_groups} must not exceed the {len(prompts_P)} prompts; pass more prompts")
        # this rank's requests, seeded by what is the same for any number of ranks
        occurrence_P = _occurrences(prompts_P)
        own = share(len(prompts_P), rank=self._rank, world_size=self._world_size)
        requests_PG = [
            [self._request(prompt, step, refill, occurrence, sample) for sample in range(self._num_samples)]
            for prompt, occurrence in zip(prompts_P[own], occurrence_P[own], strict=True)
        ]
        # the first whole groups win where there are more than wanted, else all are waited for
        if num_groups < len(prompts_P):
            completions = self._race(requests_PG, share(num_groups, rank=self._rank, world_size=self._world_size))
        else:
            flat = self._engine.generate([request for group in requests_PG for request in group], self._options)
            size = self._num_samples
            completions = {i: flat[i * size : (i + 1) * size] for i in range(len(requests_PG))}
        return [RolloutGroup(prompts_P[own][i], tuple(completions[i])) for i in sorted(completions)]

    def _race(self, requests_PG: Sequence[Sequence[GenerateRequest]], wanted: slice) -> dict[int, list[Completion]]:
        assert isinstance(self._engine, RacingEngine)  # the configuration refuses over-sampling with another one
        return self._engine.generate_first(requests_PG, self._options, wanted=wanted.stop - wanted.start)

    def _request(self, prompt: Prompt, step: int, refill: int, occurrence: int, sample: int) -> GenerateRequest:
        seed = derive_seed(self._stream_seed, step, refill, prompt.id, occurrence, sample)
        return GenerateRequest(prompt.token_ids, seed, self._max_new_tokens)


def _occurrences(prompts_P: Sequence[Prompt]) -> list[int]:
    """Returns, for every prompt, how many earlier prompts of the batch have its id."""
    seen: dict[int, int] = {}
    occurrence_P = []
    for prompt in prompts_P:
        occurrence_P.append(seen.get(prompt.id, 0))
        seen[prompt.id] = occurrence_P[-1] + 1
    return occurrence_P

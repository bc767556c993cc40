"""The evaluation sets of a run, ready to be answered, and whether the policy that it ended with was evaluated."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from aer_megatron.algo.passk import majority_at_k
from aer_megatron.compose.data import Data
from aer_megatron.config import Config
from aer_megatron.loop.parts import EvaluationSet
from aer_megatron.parallel.exchange import all_gather_arrays
from aer_megatron.parallel.platform import Platform
from aer_megatron.report.metrics import of_set
from aer_megatron.report.writer import METRICS_FILE, read_metrics
from aer_megatron.rewards.answer_classes import classify_answers, tells_answers_apart
from aer_megatron.rewards.pool import VerifierPool
from aer_megatron.rollout.collect import RolloutCollector
from aer_megatron.rollout.engine import RolloutEngine, SamplingOptions
from aer_megatron.rollout.seeds import stream_seed
from aer_megatron.types import Float64Array, ScoredGroup


def evaluation_sets(
    config: Config, engine: RolloutEngine, data: Data, platform: Platform, pool: VerifierPool
) -> tuple[EvaluationSet, ...]:
    """Returns the sets of ``data``, each with a stream of random numbers of its own."""
    votes = functools.partial(vote, decode=data.decode, pool=pool, device=platform.device)
    sets: list[EvaluationSet] = []
    for name, prompts in data.evaluation.items():
        options = config.eval.sets[name]
        collector = RolloutCollector(
            engine,
            SamplingOptions(options.temperature, options.top_p, options.top_k, frozenset(data.stop_ids)),
            num_samples=options.num_samples,
            max_new_tokens=options.length_limit(config.rollout.max_new_tokens),
            stream_seed=stream_seed(config.run.seed, f"eval.{name}"),
            rank=platform.rank,
            world_size=platform.world_size,
        )
        has_votes = all(tells_answers_apart(prompt.verifier) for prompt in prompts)
        sets.append(EvaluationSet(name, options, prompts, collector, votes if has_votes else None))
    return tuple(sets)


def vote(
    scored: Sequence[ScoredGroup],
    ks: Sequence[int],
    *,
    decode: Callable[[Sequence[int]], str],
    pool: VerifierPool,
    device: torch.device,
) -> dict[int, Float64Array]:
    """See parts.Votes; every rank calls it with its own groups."""
    if not ks:
        return {}
    classes = [each for each in classify_answers(scored, decode, pool) if each is not None]  # all: the set has votes
    counts_P = np.array([len(group.verdicts) for group in scored], dtype=np.int64)
    sizes_P, right_P = [each.sizes for each in classes], [each.right for each in classes]
    mine = [majority_at_k(counts_P, sizes_P, right_P, k=k) for k in ks]
    of_ranks = all_gather_arrays(mine, device=device)
    return {k: np.concatenate([arrays[index] for arrays in of_ranks]) for index, k in enumerate(ks)}


def last_evaluation_is_missing(config: Config) -> bool:
    """Returns whether the folder of a run that is trained to its end lacks the evaluation of the policy it ended with.

    Raises:
        ValueError: metrics.jsonl is damaged.
    """
    path = Path(config.run.output_dir) / METRICS_FILE
    wanted = {of_set(name, "truncated") for name, each in config.eval.sets.items() if each.every}
    last = read_metrics(path)[-1:] if wanted and path.is_file() else []
    return not wanted <= set().union(*(record for record in last if record["step"] == config.run.num_steps))

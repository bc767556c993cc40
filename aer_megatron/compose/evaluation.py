"""The evaluation sets of a run, ready to be answered, and whether the policy that it ended with was evaluated."""

from __future__ import annotations

from pathlib import Path

from aer_megatron.compose.data import Data
from aer_megatron.config import Config
from aer_megatron.loop.parts import EvaluationSet
from aer_megatron.parallel.platform import Platform
from aer_megatron.report.metrics import of_set
from aer_megatron.report.writer import METRICS_FILE, read_metrics
from aer_megatron.rollout.collect import RolloutCollector
from aer_megatron.rollout.engine import RolloutEngine, SamplingOptions
from aer_megatron.rollout.seeds import stream_seed


def evaluation_sets(config: Config, engine: RolloutEngine, data: Data, platform: Platform) -> tuple[EvaluationSet, ...]:
    """Returns the sets of ``data``, each with a stream of random numbers of its own."""
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
        sets.append(EvaluationSet(name, options, prompts, collector))
    return tuple(sets)


def last_evaluation_is_missing(config: Config) -> bool:
    """Returns whether the folder of a run that is trained to its end lacks the evaluation of the policy it ended with.

    Raises:
        ValueError: metrics.jsonl is damaged.
    """
    path = Path(config.run.output_dir) / METRICS_FILE
    wanted = {of_set(name, "truncated") for name, each in config.eval.sets.items() if each.every}
    last = read_metrics(path)[-1:] if wanted and path.is_file() else []
    return not wanted <= set().union(*(record for record in last if record["step"] == config.run.num_steps))

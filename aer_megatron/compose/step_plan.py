"""What one step of a run is made of and what it costs a rank: the arithmetic of ``--dry-run`` and of ``aer plan``.

This file turns a configuration and a model into the numbers that costs/ takes; it holds no formula of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from aer_megatron.config import Config
from aer_megatron.convert.architecture import ModelArchitecture, pad_query_groups, padded_vocab_size
from aer_megatron.costs.memory import (
    DTYPE_BYTES,
    BatchShape,
    EngineMemory,
    StageMemory,
    TrainingForm,
    embedded_engine_memory,
    stage_memory,
)
from aer_megatron.costs.model_size import Layout, Recompute
from aer_megatron.costs.step import Workload


@dataclass(frozen=True, slots=True)
class StepPlan:
    """A run's step under any layout. Example: ``StepPlan(config, arch).micro_batches(layout, 2)``."""

    config: Config
    arch: ModelArchitecture  # as published: without the zero heads that a layout may add

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return self.config.data.max_prompt_tokens + self.config.rollout.max_new_tokens

    def check_positions(self) -> None:
        """Raises ValueError where a sequence of training or evaluation may be longer than the model has positions."""
        data, rollout = self.config.data, self.config.rollout
        if self.longest > self.arch.max_positions:
            raise ValueError(
                f"data.max_prompt_tokens={data.max_prompt_tokens} + rollout.max_new_tokens={rollout.max_new_tokens} = "
                f"{self.longest} exceeds the model's {self.arch.max_positions} positions; lower one"
            )
        for name, each in self.config.eval.sets.items():
            limit = each.length_limit(rollout.max_new_tokens)
            if data.max_prompt_tokens + limit > self.arch.max_positions:
                raise ValueError(
                    f"data.max_prompt_tokens={data.max_prompt_tokens} + eval.sets.{name}.max_new_tokens={limit} "
                    f"exceeds the model's {self.arch.max_positions} positions; lower one"
                )

    @property
    def work(self) -> Workload:
        """One step's rollouts, each sequence as long as it may be."""
        rollout, algo = self.config.rollout, self.config.algo
        return Workload(
            sequences=rollout.prompts_per_step * rollout.group_size,
            prompt_tokens=self.config.data.max_prompt_tokens,
            response_tokens=rollout.max_new_tokens,
            minibatches=algo.num_minibatches,
            passes=2 if algo.kl_coefficient else 1,
        )

    def own_layout(self, num_ranks: int) -> Layout:
        """Returns the run file's layout; raises ValueError where ``num_ranks`` do not fit it."""
        own, recompute = self.config.parallel, _recompute(self.config)
        dp = self.config.check_world_size(num_ranks)
        return Layout(own.tp, own.pp, dp, own.ep, own.sequence_parallel, recompute, own.cp, own.vpp)

    def padded_length(self, layout: Layout) -> int:
        """Returns the longest sequence as the layout cuts it: whole pieces for every cp and sequence-parallel rank."""
        multiple = math.lcm(2 * layout.cp if layout.cp > 1 else 1, layout.cp * layout.sequence_shards)
        return -(-self.longest // multiple) * multiple

    def own_micro_batch_size(self, layout: Layout) -> int:
        """Returns the sequences of the run file's micro-batches; of packed ones, of the longest sequences."""
        own = self.config.parallel
        return own.tokens_per_micro_batch // self.padded_length(layout) or own.micro_batch_size

    def micro_batches(self, layout: Layout, micro_batch_size: int) -> int:
        """Returns the micro-batches of one optimizer step on one rank."""
        return math.ceil(self.work.sequences / self.work.minibatches / layout.dp / micro_batch_size)

    def training_form(self, layout: Layout) -> TrainingForm:
        """Returns the kernels and formats that the run has on a GPU."""
        model = self.config.model
        return TrainingForm(
            dtype_bytes=DTYPE_BYTES[model.dtype],
            attention="flash",
            head=model.head,
            vocab_rows=padded_vocab_size(self.arch.vocab_size, layout.tp, divisible_by=model.vocab_multiple),
            fused_swiglu=bool(self.config.megatron.get("bias_activation_fusion")),
        )

    def batch_shape(self, layout: Layout, micro_batch_size: int) -> BatchShape:
        """Returns a micro-batch of the longest sequences."""
        responses = micro_batch_size * self.config.rollout.max_new_tokens
        return BatchShape(micro_batch_size, self.padded_length(layout), responses)

    def training_memory(self, layout: Layout, micro_batch_size: int) -> tuple[int, StageMemory]:
        """Returns (pipeline stage, memory of its ranks) of the first or last stage, whichever needs more."""
        arch, form = pad_query_groups(self.arch, layout.tp), self.training_form(layout)
        batch, count = self.batch_shape(layout, micro_batch_size), self.micro_batches(layout, micro_batch_size)
        stages = {
            stage: stage_memory(arch, layout, batch, form, stage=stage, num_micro_batches=count)
            for stage in {0, layout.pp - 1}
        }
        worst = max(stages, key=lambda stage: stages[stage].total)
        return worst, stages[worst]

    def decoded_together(self, layout: Layout) -> int:
        """Returns the sequences that one rank decodes together; 0 where the rollouts run on servers."""
        rollout = self.config.rollout
        if rollout.uses_servers:
            return 0
        return min(rollout.max_batch_size, math.ceil(self.work.sequences / layout.num_ranks))

    def engine_memory(self, layout: Layout) -> EngineMemory:
        """Returns what generation takes of a rank at most, evaluation included; for servers the gathered weights."""
        config, rollout = self.config, self.config.rollout
        prompt_tokens, bucket_bytes = config.data.max_prompt_tokens, config.parallel.weight_bucket_mb * 10**6
        if rollout.uses_servers:
            return EngineMemory(0, 0, 2 * bucket_bytes)
        # (sequences, of which so many have the same prompt, tokens of the longest)
        batches = [(self.work.sequences, rollout.group_size, self.longest)]
        for each in config.eval.sets.values():
            length = prompt_tokens + each.length_limit(rollout.max_new_tokens)
            batches += [(each.num_prompts * each.num_samples, each.num_samples, length)] if each.every else []
        memories = [
            embedded_engine_memory(
                self.arch,
                dtype_bytes=DTYPE_BYTES[config.model.dtype],
                batch=(together := min(rollout.max_batch_size, math.ceil(sequences / layout.num_ranks))),
                prompts=math.ceil(together / num_samples),
                prompt_tokens=prompt_tokens,
                length=length,
                bucket_bytes=bucket_bytes,
            )
            for sequences, num_samples, length in batches
        ]
        return max(memories, key=lambda memory: memory.rollout)


def fewest_ranks(config: Config) -> int:
    """Returns the least number of ranks that the run file's layout takes."""
    parallel = config.parallel
    return parallel.tp * parallel.pp * math.lcm(parallel.cp, parallel.ep)


def _recompute(config: Config) -> Recompute:
    value = config.megatron.get("recompute_granularity")
    if value not in (None, "selective", "full"):
        raise ValueError(f"megatron.recompute_granularity={value!r} is not 'selective' or 'full'; use one or drop it")
    return value or "none"

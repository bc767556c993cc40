"""The run's configuration, section by section, and the rules between sections.

A run file is TOML; dotted overrides come from the command line (``--algo.entropy.kind=none``); an unknown key is an
error that names the nearest known one (config_loading.py reads both). Every section is a frozen pydantic model; options
and defaults stand in options/ (those of ``[algo]`` in algo/options.py).

``[megatron]`` passes through to Megatron-Core's TransformerConfig unchanged, ``[sglang.launch]`` to the servers.

This file does NOT touch torch or know ranks.
"""

from __future__ import annotations

import itertools
from typing import Any, Self

from pydantic import Field, model_validator

from aer_megatron.algo import options as algo_options
from aer_megatron.algo.options import AlgoSection, CorrectionSection
from aer_megatron.config_section import Section
from aer_megatron.options import data as data_options
from aer_megatron.options import report as report_options
from aer_megatron.options.data import DataSection, EvalSection, RewardSection, SftSection
from aer_megatron.options.report import ReportSection
from aer_megatron.options.rollout import RolloutSection, SglangSection
from aer_megatron.options.training import ModelSection, OptimizerSection, ParallelSection, RunSection


class Config(Section):
    """A whole run."""

    moved = algo_options.MOVED_OPTIONS | data_options.MOVED_OPTIONS | report_options.MOVED_OPTIONS

    run: RunSection = RunSection()
    model: ModelSection
    parallel: ParallelSection = ParallelSection()
    megatron: dict[str, Any] = Field(default_factory=dict, description="passed to Megatron-Core's TransformerConfig")
    optimizer: OptimizerSection = OptimizerSection()
    data: DataSection
    rollout: RolloutSection = RolloutSection()
    sglang: SglangSection = SglangSection()
    rewards: RewardSection = RewardSection()
    algo: AlgoSection = AlgoSection()
    eval: EvalSection = EvalSection()
    sft: SftSection = SftSection()
    report: ReportSection = ReportSection()

    @model_validator(mode="after")
    def _cross_checks(self) -> Self:
        sequences = self.rollout.prompts_per_step * self.rollout.group_size
        if sequences % self.algo.num_minibatches:
            raise ValueError(
                f"algo.num_minibatches={self.algo.num_minibatches} must divide rollout.prompts_per_step * "
                f"rollout.group_size = {sequences}; use one of {_divisors(sequences)}"
            )
        self.run.check()
        self.optimizer.check("optimizer")
        self.sft.optimizer.check("sft.optimizer")
        self.data.check()
        self.parallel.check(self.data.max_prompt_tokens + self.rollout.max_new_tokens)
        self.algo.check(self.rollout.group_size, self.rollout.max_new_tokens)
        self.rollout.check()
        self.eval.check(self.rollout.engine, release_memory=self.sglang.release_memory)
        if self.rollout.uses_servers:
            self.sglang.check()
        return self

    @property
    def correction(self) -> CorrectionSection:
        """``[algo.correction]``, what ``weight = "auto"`` means decided."""
        options = self.algo.correction
        if options.weight != "auto":
            return options
        differs = self.rollout.staleness > 0 or self.rollout.quantization != "none"
        return options.model_copy(update={"weight": "token" if differs else "none"})

    def check_world_size(self, world_size: int) -> int:
        """Returns the data-parallel size of ``world_size`` ranks.

        Raises:
            ValueError: if the sizes do not fit, naming the options and the remedy.
        """
        tp, pp, cp = self.parallel.tp, self.parallel.pp, self.parallel.cp
        model_parallel = tp * pp * cp
        if world_size % model_parallel:
            product = f"parallel.tp={tp} * parallel.pp={pp}" + (f" * parallel.cp={cp}" if cp > 1 else "")
            raise ValueError(
                f"{product} = {model_parallel} must divide the number of ranks {world_size}; launch a multiple of "
                f"{model_parallel} ranks or lower tp/pp{'/cp' if cp > 1 else ''}"
            )
        dp = world_size // model_parallel
        if dp * cp % self.parallel.ep:
            size = f"data-parallel size {dp}" if cp == 1 else f"dp * cp = {dp} * {cp} ranks"
            raise ValueError(
                f"parallel.ep={self.parallel.ep} must divide the {size} = {world_size} ranks / "
                f"(tp * pp = {tp * pp}); use one of {_divisors(dp * cp)}"
            )
        per_step = self.rollout.prompts_per_step * self.rollout.group_size // self.algo.num_minibatches
        if per_step % dp:
            raise ValueError(
                f"a mini-batch of {per_step} sequences must be a multiple of the data-parallel size {dp}; change "
                "rollout.prompts_per_step, rollout.group_size or algo.num_minibatches"
            )
        return dp


def _divisors(number: int) -> list[int]:
    """Returns the smallest divisors, at most eight, found in bounded time."""
    candidates = range(1, min(number, 10_000) + 1)
    return list(itertools.islice((d for d in candidates if number % d == 0), 8))

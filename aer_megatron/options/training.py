"""Options of the run, the model, its layout and the optimizer."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from aer_megatron.config_section import Section
from aer_megatron.options.texts import SEED_LIMIT, PathText, Text


class RunSection(Section):
    name: Text = Field("run", description="label of the run in reports")
    output_dir: PathText = Field("runs/run", description="folder that receives metrics, reports and checkpoints")
    seed: int = Field(0, ge=0, lt=SEED_LIMIT, description="seeds data order, rollouts and initialisation")
    num_steps: int = Field(100, ge=1, description="policy updates' rollout batches")
    checkpoint_every: int = Field(0, ge=0, description="write a checkpoint every k steps; 0 = only at the end")
    keep_checkpoints: int = Field(2, ge=1, description="newest checkpoints kept")
    keep_best: str = Field(
        "",
        description='metric of an evaluation set, such as "eval/aime24/pass@1": the checkpoint with its highest value '
        "is kept beside the newest; empty = none",
    )
    export_every: int = Field(
        0, ge=0, description="write a Hugging Face folder to output_dir/export every k steps and at the end; 0 = never"
    )
    async_checkpoint: bool = Field(
        True, description="write checkpoints beside training, from a copy in host memory; false = training waits"
    )
    resume: bool = Field(True, description="continue from the newest checkpoint in output_dir, if there is one")
    max_hours: float = Field(
        0.0, ge=0, description="save and end in time, with exit code 0, when the next step would not fit; 0 = no limit"
    )
    hang_timeout_s: float = Field(
        1800.0, ge=0, description="a rank that stays longer in one phase or call ends the run, saying where; 0 = off"
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="an update whose loss or gradient is not finite ends the run, or is left out; never applied"
    )
    max_skipped_updates: int = Field(3, ge=0, description="updates left out in a row beyond which the run ends anyway")
    keep_reproducers: int = Field(
        2, ge=0, description="newest updates kept in output_dir/nonfinite for aer replay-batch; 0 = none"
    )
    reproducer_gb: float = Field(
        20.0, ge=0, description="weights of a kept update up to this size are kept with it, GB (10^9 bytes)"
    )
    record_batch: int = Field(-1, ge=-1, description="keep this step's batch in output_dir/recorded too; -1 = none")
    profile_steps: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (), strict=False, description="[first, last] step of a torch profile of every rank, in output_dir/profile"
    )

    def check(self) -> None:
        """Raises ValueError where ``profile_steps`` is no range, or ``keep_best`` has nothing to choose among."""
        steps = self.profile_steps
        if steps and (len(steps) != 2 or steps[0] > steps[1]):
            raise ValueError(f"run.profile_steps={list(steps)} must be a first and a last step, such as [5, 7]")
        if self.keep_best and not self.checkpoint_every:
            raise ValueError(
                f"run.keep_best={self.keep_best!r} chooses among checkpoints, and run.checkpoint_every=0 writes the "
                "last one alone; set it, best to a multiple of the set's 'every'"
            )


class ModelSection(Section):
    path: PathText = Field(description="Hugging Face folder: config.json, tokenizer, *.safetensors")
    dtype: Literal["fp32", "bf16"] = Field("bf16", description="training precision of weights and activations")
    head: Literal["fused", "logits"] = Field(
        "fused", description="fused: logits never exist beyond a chunk of tokens; logits: the whole logits once"
    )
    vocab_multiple: int = Field(
        1, ge=1, description="each rank's vocabulary shard is padded to a multiple of this; 128 on GPUs"
    )


class ParallelSection(Section):
    tp: int = Field(1, ge=1, description="tensor-parallel size")
    pp: int = Field(1, ge=1, description="pipeline-parallel size")
    vpp: int = Field(1, ge=1, description="model chunks per pipeline rank (interleaved schedule); needs pp > 1")
    cp: int = Field(1, ge=1, description="context-parallel size: every sequence is cut over so many ranks")
    ep: int = Field(1, ge=1, description="expert-parallel size; divides the dp * cp ranks among the experts")
    sequence_parallel: bool = Field(False, description="shard norms and dropout along the sequence over tp")
    micro_batch_size: int = Field(1, ge=1, description="sequences per padded micro-batch and data-parallel rank")
    tokens_per_micro_batch: int = Field(
        0, ge=0, description="token budget of a packed micro-batch (its cp ranks share it); 0 = padded micro-batches"
    )
    weight_bucket_mb: int = Field(
        256, ge=1, description="weights are gathered for rollouts in buckets of about this many MB (10^6 bytes)"
    )

    def check(self, longest: int) -> None:
        """Raises ValueError where options exclude one another or ``longest`` tokens do not fit a micro-batch."""
        if self.sequence_parallel and self.tp == 1:
            raise ValueError("parallel.sequence_parallel=true needs parallel.tp > 1; set it to false")
        if self.vpp > 1 and self.pp == 1:
            raise ValueError(f"parallel.vpp={self.vpp} needs parallel.pp > 1, stages to interleave; set it to 1")
        needed = self.padded(longest)
        if 0 < self.tokens_per_micro_batch < needed:
            raise ValueError(
                f"parallel.tokens_per_micro_batch={self.tokens_per_micro_batch} must hold the longest sequence: "
                f"data.max_prompt_tokens + rollout.max_new_tokens = {longest} (padded: {needed}); set at least "
                f"{needed}, or 0 for padded micro-batches"
            )

    def padded(self, length: int) -> int:
        """Returns a sequence's length as it is cut: whole pieces for every context- and sequence-parallel rank."""
        shards = self.cp * (self.tp if self.sequence_parallel else 1)
        multiple = math.lcm(2 * self.cp if self.cp > 1 else 1, shards)
        return -(-length // multiple) * multiple


class OptimizerSection(Section):
    lr: float = Field(1e-6, gt=0, description="peak learning rate of AdamW")
    warmup_steps: int = Field(0, ge=0, description="linear warm-up, in optimizer steps")
    decay: Literal["constant", "linear", "cosine"] = Field("constant", description="schedule after the warm-up")
    min_lr: float = Field(0.0, ge=0, description="learning rate at the end of a linear or cosine decay")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.98, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    clip_grad: float = Field(1.0, ge=0, description="global gradient-norm bound; 0 = no clipping")

    def check(self, name: str) -> None:
        """Raises ValueError where the decay of section ``name`` would raise the learning rate."""
        if self.decay != "constant" and self.min_lr > self.lr:
            raise ValueError(
                f"{name}.min_lr={self.min_lr:g} must be at most {name}.lr={self.lr:g}, from which the {self.decay} "
                f"decay starts; lower it, or set {name}.decay='constant'"
            )

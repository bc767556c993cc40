"""Options of problems, their verifiers, evaluation and the supervised stage."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from aer_megatron.config_section import IMPORTABLE, Section
from aer_megatron.options.texts import SEED_LIMIT, OptionalPath, OptionalText, Text
from aer_megatron.options.training import OptimizerSection

_NAME = r"^\w[\w.-]{0,95}$"
_DATASET = r"^\w[\w.-]{0,95}(/\w[\w.-]{0,95})?$"
_SET_NAME = re.compile(r"[a-z][a-z0-9_]*")
TRAINING_SET = "train"  # the name of what is trained on, beside those of evaluation sets

# what is told who gives an option of former versions
MOVED_OPTIONS = {
    "data.eval": "evaluation sets have names now: write [eval.sets.NAME.source]",
    "run.eval_every": "it is eval.sets.NAME.every",
    **{f"eval.{name}": f"it is eval.sets.NAME.{name}" for name in ("num_prompts", "num_samples", "k", "temperature")},
}


class SourceSection(Section):
    """Where problems come from: exactly one of ``path``, ``task`` and ``dataset``."""

    path: OptionalPath = Field(None, description='JSONL or Parquet file of {"problem"|"prompt", "answer", ...}')
    task: str | None = Field(None, min_length=1, description='procedural set: "countdown" or "reasoning_gym:NAME"')
    size: int = Field(10_000, ge=1, description="items of a procedural set")
    seed: int = Field(0, ge=0, lt=SEED_LIMIT, description="seed of a procedural set")
    options: dict[str, Any] = Field(default_factory=dict, description="options of a procedural set")
    dataset: str | None = Field(None, pattern=_DATASET, description="set of the Hugging Face hub, read as Parquet")
    split: str | None = Field(None, pattern=_NAME, description='split of the dataset, e.g. "train"')
    subset: str | None = Field(None, pattern=_NAME, description="subset (configuration) of a dataset that has several")

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if sum(place is not None for place in (self.path, self.task, self.dataset)) != 1:
            raise ValueError(
                "exactly one of path, task and dataset must be given: a file, a procedural set, or a set of the hub"
            )
        if (self.dataset is None) != (self.split is None):
            raise ValueError("dataset and split belong together: give both, or neither")
        if self.dataset is None and self.subset is not None:
            raise ValueError("subset belongs to dataset; leave it out")
        return self


class DataSection(Section):
    train: SourceSection
    template: Literal["plain", "chat"] = Field("chat", description="plain text, or the tokenizer's chat template")
    instruction: str = Field("{problem}", description="text put to the model; {problem} is replaced")
    system: str | None = Field(None, description="system message of the chat template")
    verifier: Text = Field("math", description="verifier of records that name none")
    verifiers: tuple[str, ...] = Field(
        (), strict=False, description='functions of yours, "package.module:function", that records may name as verifier'
    )
    max_prompt_tokens: int = Field(1024, ge=1, description="longer prompts are bad records")
    on_bad_record: Literal["error", "skip"] = "error"

    def check(self) -> None:
        """Raises ValueError where ``verifiers`` lists what is no function."""
        for name in self.verifiers:
            if IMPORTABLE.fullmatch(name) is None:
                raise ValueError(
                    f"data.verifiers={list(self.verifiers)}: {name!r} is not of the form 'package.module:function'; "
                    "built-in verifiers need not be listed"
                )


class RewardSection(Section):
    num_workers: int = Field(1, ge=1, description="verifier processes per rank")
    timeout_s: float = Field(5.0, gt=0, description="hard limit for one answer; the worker is killed beyond it")
    memory_mb: int = Field(
        4096, ge=0, description="MiB of address space of a verifier process beyond its loaded verifiers; 0: unbounded"
    )


class EvalSetSection(Section):
    """One evaluation set: its problems, how they are put and answered, and when.

    ``temperature = 0`` is greedy decoding, the most probable token of every position: one sample, pass@1.
    """

    source: SourceSection = Field(description="where its problems come from")
    verifier: OptionalText = Field(None, description="verifier of records that name none; null = data.verifier")
    instruction: str | None = Field(None, description="null = data.instruction")
    system: str | None = Field(None, description="null = data.system")
    template: Literal["plain", "chat"] | None = Field(None, description="null = data.template")
    num_prompts: int = Field(64, ge=1, description="the set's first problems that are evaluated, at most")
    num_samples: int = Field(32, ge=1, description="n, samples per problem; 1 where temperature = 0")
    k: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (1, 8, 32), strict=False, min_length=1, description="pass@k and maj@k reported; [1] where temperature = 0"
    )
    temperature: float = Field(1.0, ge=0, description="0 = greedy")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0 = off")
    max_new_tokens: int | None = Field(None, ge=1, description="null = rollout.max_new_tokens")
    every: int = Field(
        50, ge=0, description="evaluate before the first step, every so many steps and after the last; 0 = never"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, value in (("num_samples", 1), ("k", (1,))) if self.temperature == 0 else ():
            given = getattr(self, name)
            if name in self.model_fields_set and given != value:
                one = list(value) if isinstance(value, tuple) else value
                raise ValueError(
                    f"{name}={list(given) if isinstance(given, tuple) else given} with temperature=0: greedy decoding "
                    f"has one answer; leave {name} out, or set it to {one}"
                )
            self.__dict__[name] = value  # the default, and still not given
        if max(self.k) > self.num_samples:
            raise ValueError(
                f"k={list(self.k)} asks for pass@{max(self.k)} from num_samples={self.num_samples} samples; raise "
                "num_samples or drop that k"
            )
        return self

    def data_of(self, data: DataSection) -> DataSection:
        """Returns ``[data]`` as this set has it: with its own verifier, instruction, system message and template."""
        own = {name: getattr(self, name) for name in ("verifier", "instruction", "system", "template")}
        changes = {name: value for name, value in own.items() if value is not None}
        if self.template == "plain":  # which has no system message to inherit
            changes.setdefault("system", None)
        return data.model_copy(update=changes)

    def length_limit(self, max_new_tokens: int) -> int:
        """Returns the most tokens of an answer; ``max_new_tokens`` is that of training."""
        return self.max_new_tokens or max_new_tokens


class EvalSection(Section):
    sets: dict[str, EvalSetSection] = Field(default_factory=dict, description="evaluation sets by name")
    overlap: bool = Field(
        False, description="servers answer evaluation sets while the policy trains; new weights wait for it"
    )

    @model_validator(mode="after")
    def _names(self) -> Self:
        for name in self.sets:
            if not _SET_NAME.fullmatch(name) or name == TRAINING_SET:
                raise ValueError(
                    f"sets.{name[:80]}: the name of a set must be snake_case, [a-z][a-z0-9_]*, and not "
                    f"{TRAINING_SET!r}: it becomes part of metric names; rename it"
                )
        return self

    def check(self, engine: str, *, release_memory: bool) -> None:
        """Raises ValueError where nothing can answer evaluation sets beside training."""
        if not self.overlap:
            return
        if engine != "sglang":
            raise ValueError(
                "eval.overlap=true needs rollout.engine='sglang', servers that answer by themselves; the embedded "
                "engine works in turn with the trainer: set eval.overlap=false"
            )
        if release_memory:
            raise ValueError(
                "eval.overlap=true has servers answer while the policy trains, and sglang.release_memory=true takes "
                "their memory then; set one of them to false"
            )


class SftSection(Section):
    """The supervised stage: ``--stage=sft`` trains the model of ``sft.init`` and writes ``model.path``."""

    init: OptionalPath = Field(
        None, description="Hugging Face folder to start from; without *.safetensors: random weights by run.seed"
    )
    source: SourceSection | None = Field(None, description="problems with a response, or a task that can solve itself")
    num_steps: int = Field(1000, ge=1)
    batch_size: int = Field(64, ge=1, description="sequences per optimizer step over all ranks")
    optimizer: OptimizerSection = OptimizerSection(lr=1e-3, warmup_steps=50, decay="cosine")

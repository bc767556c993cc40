"""Options of problems, their verifiers, evaluation and the supervised stage."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from aer_megatron.config_section import IMPORTABLE, Section
from aer_megatron.options.texts import SEED_LIMIT, OptionalPath, Text
from aer_megatron.options.training import OptimizerSection

_NAME = r"^\w[\w.-]{0,95}$"
_DATASET = r"^\w[\w.-]{0,95}(/\w[\w.-]{0,95})?$"


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
    eval: SourceSection | None = None
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


class EvalSection(Section):
    num_prompts: int = Field(64, ge=1, description="prompts of the evaluation set")
    num_samples: int = Field(32, ge=1, description="samples per prompt, for the unbiased pass@k")
    k: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (1, 8, 32), strict=False, min_length=1, description="pass@k reported"
    )
    temperature: float = Field(1.0, gt=0)


class SftSection(Section):
    """The supervised stage: ``--stage=sft`` trains the model of ``sft.init`` and writes ``model.path``."""

    init: OptionalPath = Field(
        None, description="Hugging Face folder to start from; without *.safetensors: random weights by run.seed"
    )
    source: SourceSection | None = Field(None, description="problems with a response, or a task that can solve itself")
    num_steps: int = Field(1000, ge=1)
    batch_size: int = Field(64, ge=1, description="sequences per optimizer step over all ranks")
    optimizer: OptimizerSection = OptimizerSection(lr=1e-3, warmup_steps=50, decay="cosine")

"""The data of a run: prompt sets, the tokenizer's functions, and what is left out of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from aer_megatron.config import Config
from aer_megatron.data.prompts import PromptSet
from aer_megatron.data.skipped import SkippedRecords
from aer_megatron.data.sources import load_records
from aer_megatron.data.tokenizer import load_tokenizer, make_decoder, stop_token_ids
from aer_megatron.options.data import DataSection, SourceSection
from aer_megatron.rewards.pool import check_verifiers
from aer_megatron.rewards.registry import is_built_in
from aer_megatron.types import Prompt


@dataclasses.dataclass(frozen=True, slots=True)
class Data:
    """Prompt sets and the tokenizer's functions."""

    train: Any
    evaluation: Mapping[str, Sequence[Prompt]]  # by the name of the set
    decode: Callable[[Sequence[int]], str]
    stop_ids: tuple[int, ...]
    notes: tuple[str, ...] = ()  # what the user is told of records that were left out


def load_data(config: Config) -> Data:
    """Returns the data that the run file names; raises ValueError for records, tokenizer or verifiers that are bad."""
    tokenizer = load_tokenizer(config.model.path)
    stop_ids = stop_token_ids(config.model.path, tokenizer)
    train, notes = prompt_set(config.data, "data.train", config.data.train, tokenizer)
    evaluation, more = evaluation_prompts(
        config, tokenizer, [name for name, each in config.eval.sets.items() if each.every]
    )
    check_verifiers(train.verifiers | {prompt.verifier for prompts in evaluation.values() for prompt in prompts})
    return Data(train, evaluation, make_decoder(tokenizer, stop_ids), stop_ids, notes + more)


def evaluation_prompts(
    config: Config, tokenizer: Any, names: Iterable[str]
) -> tuple[dict[str, Sequence[Prompt]], tuple[str, ...]]:
    """Returns the problems of the named sets of ``[eval.sets]``, and lines on what was left out of them.

    Raises:
        ValueError: a set's records, or how they are put to the model, are wrong; the set is named.
    """
    prompts: dict[str, Sequence[Prompt]] = {}
    notes: tuple[str, ...] = ()
    for name in names:
        options, option = config.eval.sets[name], f"eval.sets.{name}"
        try:
            whole, more = prompt_set(options.data_of(config.data), f"{option}.source", options.source, tokenizer)
        except ValueError as error:
            raise ValueError(f"{option}: {error}") from None
        prompts[name], notes = whole[: options.num_prompts], notes + more
    return prompts, notes


def prompt_set(
    data: DataSection, option: str, source: SourceSection, tokenizer: Any
) -> tuple[PromptSet, tuple[str, ...]]:
    """Returns the prompts of ``source``, which is ``option`` of the run file, and a line on what was left out of it."""
    skipped = SkippedRecords()
    records = load_records(
        source,
        on_bad_record=data.on_bad_record,
        default_verifier=data.verifier,
        may_name=lambda name: is_built_in(name) or name in data.verifiers,
        on_skip=skipped,
    ).records
    prompts = PromptSet(records, tokenizer, data, on_skip=skipped)
    return prompts, skipped.lines(option, len(prompts))

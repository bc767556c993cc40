"""The data of a run: prompt sets, the tokenizer's functions, and what is left out of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from aer_megatron.config import Config
from aer_megatron.data.prompts import PromptSet
from aer_megatron.data.skipped import SkippedRecords
from aer_megatron.data.sources import load_records
from aer_megatron.data.tokenizer import load_tokenizer, make_decoder, stop_token_ids
from aer_megatron.options.data import SourceSection
from aer_megatron.rewards.pool import check_verifiers
from aer_megatron.rewards.registry import is_built_in


@dataclasses.dataclass(frozen=True, slots=True)
class Data:
    """Prompt sets and the tokenizer's functions."""

    train: Any
    evaluation: Sequence[Any]
    decode: Callable[[Sequence[int]], str]
    stop_ids: tuple[int, ...]
    notes: tuple[str, ...] = ()  # what the user is told of records that were left out


def load_data(config: Config) -> Data:
    """Returns the data that the run file names; raises ValueError for records, tokenizer or verifiers that are bad."""
    tokenizer = load_tokenizer(config.model.path)
    stop_ids = stop_token_ids(config.model.path, tokenizer)
    train, notes = prompt_set(config, "data.train", config.data.train, tokenizer)
    evaluation: Sequence[Any] = ()
    if config.data.eval is not None:
        whole, more = prompt_set(config, "data.eval", config.data.eval, tokenizer)
        evaluation, notes = whole[: config.eval.num_prompts], notes + more
    check_verifiers(train.verifiers | {prompt.verifier for prompt in evaluation})
    return Data(train, evaluation, make_decoder(tokenizer, stop_ids), stop_ids, notes)


def prompt_set(config: Config, option: str, source: SourceSection, tokenizer: Any) -> tuple[PromptSet, tuple[str, ...]]:
    """Returns the prompts of ``source``, which is ``option`` of the run file, and a line on what was left out of it."""
    skipped = SkippedRecords()
    records = load_records(
        source,
        on_bad_record=config.data.on_bad_record,
        default_verifier=config.data.verifier,
        may_name=lambda name: is_built_in(name) or name in config.data.verifiers,
        on_skip=skipped,
    ).records
    prompts = PromptSet(records, tokenizer, config.data, on_skip=skipped)
    return prompts, skipped.lines(option, len(prompts))

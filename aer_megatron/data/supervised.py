"""Batches of prompt + response for the supervised stage, a pure function of (seed, step).

Two sources: countdown problems with a fresh random solution every time, and files whose records have a
response. A response ends with the tokenizer's eos id.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from aer_megatron.data import countdown
from aer_megatron.data.prompts import PromptEncoder, PromptSet, epoch_order, seeded_generator
from aer_megatron.data.skipped import OnSkip, ignore
from aer_megatron.data.sources import load_supervised_records
from aer_megatron.options.data import DataSection, SourceSection
from aer_megatron.types import SupervisedBatch

Int64Array = NDArray[np.int64]

_SOLUTION_STREAM = 1  # separates the random solutions' stream from the data order's
_CHARACTERS = "0123456789,=>+-*"


class _Pairs(Protocol):
    num_skipped: int

    def __len__(self) -> int: ...

    def batch(self, index_B: Int64Array, rng: np.random.Generator) -> SupervisedBatch: ...


class SupervisedSource:
    """Batches of ``batch_size`` sequences (all ranks together), in epochs of seeded permutations.

    Raises:
        ValueError: the source cannot give responses, holds bad records, or is empty (see
            ``data/sources.py``).
    """

    def __init__(
        self,
        source: SourceSection,
        data: DataSection,
        tokenizer: PreTrainedTokenizerBase,
        *,
        eos_id: int,
        batch_size: int,
        seed: int,
        on_skip: OnSkip = ignore,
    ) -> None:
        encoder = PromptEncoder(tokenizer, data)
        self._pairs: _Pairs
        if source.task == "countdown":
            items = countdown.generate(size=source.size, seed=source.seed, options=source.options)
            lookup = _character_ids(tokenizer) if encoder.is_bare else None
            if lookup is not None:
                self._pairs = _CharacterPairs(items, lookup, eos_id)
            else:
                self._pairs = _CountdownTextPairs(items, encoder, tokenizer, eos_id)
        else:
            self._pairs = _FilePairs(source, data, tokenizer, eos_id, on_skip)
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = -1
        self._order: Int64Array = np.empty(0, dtype=np.int64)

    @property
    def num_records(self) -> int:
        """Problems in one epoch."""
        return len(self._pairs)

    @property
    def num_skipped(self) -> int:
        """Bad records that ``data.on_bad_record="skip"`` left out."""
        return self._pairs.num_skipped

    def batch(self, step: int) -> SupervisedBatch:
        """Returns the global batch of ``step`` (>= 0); a step gives the same batch in any order of calls."""
        first = step * self._batch_size
        rng = seeded_generator(self._seed, _SOLUTION_STREAM, step)
        return self._pairs.batch(self._indices(first, first + self._batch_size), rng)

    def _indices(self, start: int, stop: int) -> Int64Array:
        parts = []
        while start < stop:
            epoch, position = divmod(start, len(self._pairs))
            if epoch != self._epoch:
                self._epoch, self._order = epoch, epoch_order(self._seed, epoch, len(self._pairs))
            parts.append(self._order[position : position + stop - start])
            start += len(parts[-1])
        return np.concatenate(parts)


class _CharacterPairs:
    """Countdown for tokenizers with one id per character: whole batches by table lookup."""

    num_skipped = 0

    def __init__(self, items: countdown.CountdownItems, id_of_code: Int64Array, eos_id: int) -> None:
        self._items = items
        self._id_of_code = id_of_code
        self._eos_id = eos_id

    def __len__(self) -> int:
        return len(self._items)

    def batch(self, index_B: Int64Array, rng: np.random.Generator) -> SupervisedBatch:
        solution = countdown.random_solutions(self._items, index_B, rng).astype(np.int64)
        target = self._items.target_N[index_B]
        codes = np.zeros((len(index_B), 11 + solution.shape[1] + 1), dtype=np.int64)  # "a,b,c,d=" "tt" ">" ... eos
        codes[:, 0:8:2] = self._items.number_N4[index_B] + ord("0")
        codes[:, 1:7:2] = ord(",")
        codes[:, 7] = ord("=")
        codes[:, 8] = target // 10 + ord("0")
        codes[:, 9] = target % 10 + ord("0")
        codes[:, 10] = ord(">")
        codes[:, 11:-1] = solution
        ids = self._id_of_code[codes]
        ids[:, -1] = self._eos_id
        present = np.ones_like(ids, dtype=np.bool_)
        present[:, 8] = target >= 10
        return SupervisedBatch(
            prompt_length_B=10 + present[:, 8].astype(np.int64),
            response_length_B=np.full(len(index_B), solution.shape[1] + 1, dtype=np.int64),
            token_ids_L=ids[present],
        )


class _CountdownTextPairs:
    """Countdown for any tokenizer and template, one text at a time."""

    num_skipped = 0

    def __init__(
        self,
        items: countdown.CountdownItems,
        encoder: PromptEncoder,
        tokenizer: PreTrainedTokenizerBase,
        eos_id: int,
    ) -> None:
        self._items = items
        self._encoder = encoder
        self._tokenizer = tokenizer
        self._eos_id = eos_id
        self._problems, _ = items.texts()

    def __len__(self) -> int:
        return len(self._items)

    def batch(self, index_B: Int64Array, rng: np.random.Generator) -> SupervisedBatch:
        solutions = [bytes(row).decode() for row in countdown.random_solutions(self._items, index_B, rng).tolist()]
        return _pack(
            [self._encoder.encode(self._problems[i]) for i in index_B.tolist()],
            [_encode_response(self._tokenizer, text, self._eos_id) for text in solutions],
        )


class _FilePairs:
    """Records with a response, tokenised on first use and kept."""

    def __init__(
        self,
        source: SourceSection,
        data: DataSection,
        tokenizer: PreTrainedTokenizerBase,
        eos_id: int,
        on_skip: OnSkip,
    ) -> None:
        records, num_bad = load_supervised_records(source, on_bad_record=data.on_bad_record, on_skip=on_skip)
        self._prompts = PromptSet(records, tokenizer, data, on_skip)
        self.num_skipped = num_bad + self._prompts.num_skipped
        self._tokenizer = tokenizer
        self._eos_id = eos_id
        self._responses: dict[int, tuple[int, ...]] = {}

    def __len__(self) -> int:
        return len(self._prompts)

    def batch(self, index_B: Int64Array, rng: np.random.Generator) -> SupervisedBatch:
        indices = index_B.tolist()
        return _pack([self._prompts[i].token_ids for i in indices], [self._response(i) for i in indices])

    def _response(self, index: int) -> tuple[int, ...]:
        if index not in self._responses:
            text = self._prompts.records[index].response or ""
            self._responses[index] = _encode_response(self._tokenizer, text, self._eos_id)
        return self._responses[index]


def _encode_response(tokenizer: PreTrainedTokenizerBase, text: str, eos_id: int) -> tuple[int, ...]:
    return (*tokenizer.encode(text, add_special_tokens=False), eos_id)


def _pack(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> SupervisedBatch:
    ids = [token for pair in zip(prompts, responses, strict=True) for part in pair for token in part]
    return SupervisedBatch(
        prompt_length_B=np.array([len(prompt) for prompt in prompts], dtype=np.int64),
        response_length_B=np.array([len(response) for response in responses], dtype=np.int64),
        token_ids_L=np.array(ids, dtype=np.int64),
    )


def _character_ids(tokenizer: PreTrainedTokenizerBase) -> Int64Array | None:
    """Returns ASCII code -> token id, int64 [128], or None if the tokenizer merges characters."""
    lookup = np.zeros(128, dtype=np.int64)
    for character in _CHARACTERS:
        ids = tokenizer.encode(character, add_special_tokens=False)
        if len(ids) != 1:
            return None
        lookup[ord(character)] = ids[0]
    # every neighbourhood of a problem and an answer: a merge of two characters would show
    for text in ("1,23,45,67,89,9=10>3+5*2-8", "0123456789", "1-1+1*1-9*9+8", "=99>", "=7>"):
        if tokenizer.encode(text, add_special_tokens=False) != lookup[[ord(c) for c in text]].tolist():
            return None
    return lookup

"""Records become prompts (token ids), and a cursor hands them out in seeded, resumable epochs.

This file does NOT keep the cursor's state anywhere: the checkpoint stores ``PromptCursor.state_dict()``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from aer_megatron.data.records import Conversation, Message, Record
from aer_megatron.data.skipped import OnSkip, ignore
from aer_megatron.options.data import DataSection
from aer_megatron.types import Prompt

_PLACEHOLDER = "{problem}"
_ORDER_STREAM = 0
_TEMPLATE_SLACK = 16  # tokens by which a text's join with its template may exceed the sum of the two


class PromptEncoder:
    """Turns problems into the ids put to the model, by ``data.template`` and ``data.instruction``.

    A conversation goes through the chat template as it is, so it takes neither an instruction nor a system message.

    Raises:
        ValueError: the instruction has no {problem}, or the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: DataSection) -> None:
        if _PLACEHOLDER not in data.instruction:
            raise ValueError(f"data.instruction={data.instruction!r} must contain {_PLACEHOLDER}; add it")
        if data.template == "chat" and not tokenizer.chat_template:
            raise ValueError(
                "data.template='chat' needs a tokenizer with a chat template and this one has none; "
                "use data.template='plain'"
            )
        if data.template == "plain" and data.system is not None:
            raise ValueError("data.system belongs to data.template='chat'; put the text into data.instruction")
        self._tokenizer = tokenizer
        self._data = data
        self._num_template_tokens: dict[tuple[str, ...], int] = {}

    @property
    def is_bare(self) -> bool:
        """Whether the ids are those of the problem text and nothing else."""
        return self._data.template == "plain" and self._data.instruction == _PLACEHOLDER

    def encode(self, problem: str | Conversation) -> tuple[int, ...]:
        """Returns the prompt's token ids, generation prompt included for a chat template."""
        return self.encode_many([problem])[0]

    def encode_many(self, problems: Sequence[str | Conversation]) -> list[tuple[int, ...]]:
        """Returns the token ids of every problem's prompt; many at once cost far less than one by one.

        Raises:
            ValueError: a conversation does not suit the options, or the chat template.
        """
        if not problems:
            return []
        if self._data.template == "plain":
            texts = [self._text(problem) for problem in problems]
            encoded: Any = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        else:
            try:
                encoded = self._tokenizer.apply_chat_template(
                    [self._messages(problem) for problem in problems],
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=False,
                )
            except TemplateError as error:
                raise ValueError(f"the tokenizer's chat template refuses the conversation: {error}") from None
        return [tuple(ids) for ids in encoded]

    def max_tokens(self, problem: str | Conversation) -> int:
        """Returns a bound on the prompt's tokens without tokenising: no text has more tokens than bytes.

        Raises:
            ValueError: as ``encode_many``.
        """
        if self._data.template == "plain":
            return len(self._text(problem).encode())
        # what the template adds depends on the roles alone
        messages = () if isinstance(problem, str) else problem
        roles = tuple(message.role for message in messages)
        if roles not in self._num_template_tokens:
            skeleton = tuple(Message(role, "") for role in roles) or ""
            self._num_template_tokens[roles] = len(self.encode(skeleton))
        if isinstance(problem, str):
            texts = [problem] * self._data.instruction.count(_PLACEHOLDER)
        else:
            texts = [message.content for message in messages]
        return self._num_template_tokens[roles] + sum(len(text.encode()) + _TEMPLATE_SLACK for text in texts)

    def _text(self, problem: str | Conversation) -> str:
        """Returns the text of a problem under the instruction."""
        if not isinstance(problem, str):
            raise ValueError(f"it is a conversation of {len(problem)} messages; that needs data.template='chat'")
        # replace, not format: problems and instructions are full of LaTeX braces
        return self._data.instruction.replace(_PLACEHOLDER, problem)

    def _messages(self, problem: str | Conversation) -> list[dict[str, str]]:
        """Returns what the chat template takes."""
        if isinstance(problem, str):
            system = [] if self._data.system is None else [{"role": "system", "content": self._data.system}]
            return [*system, {"role": "user", "content": self._text(problem)}]
        if self._data.instruction != _PLACEHOLDER or self._data.system is not None:
            raise ValueError(
                f"it is a conversation of {len(problem)} messages, which goes through the chat template as it is; "
                "leave out data.instruction and data.system"
            )
        return [message._asdict() for message in problem]


class PromptSet(Sequence[Prompt]):
    """The prompts of a set of records, tokenised on first use and kept.

    Prompts longer than ``data.max_prompt_tokens`` are bad records. No text has more tokens than bytes, so
    only texts with that many bytes are tokenised here: a set of 17,000 prompts opens at once, and a long
    prompt still fails before the first step.

    Raises:
        ValueError: a prompt is too long or empty with ``data.on_bad_record="error"``, or no prompt is left.
    """

    def __init__(
        self,
        records: Sequence[Record],
        tokenizer: PreTrainedTokenizerBase,
        data: DataSection,
        on_skip: OnSkip = ignore,
    ) -> None:
        self._encoder = PromptEncoder(tokenizer, data)
        self._max_tokens = data.max_prompt_tokens
        self._prompts: dict[int, Prompt] = {}
        self._records = self._drop_bad(records, on_skip if data.on_bad_record == "skip" else None)
        self.num_skipped = len(records) - len(self._records)
        if not self._records:
            raise ValueError(
                f"no prompts are left of {len(records)} records; raise "
                f"data.max_prompt_tokens={self._max_tokens} "
                f"or give a source with records"
            )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        """Returns the prompt at ``index``, or a list of prompts for a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        if index not in self._prompts:
            record = self._records[index]
            self._prompts[index] = self._to_prompt(record, self._encoder.encode(record.prompt))
        return self._prompts[index]

    @property
    def records(self) -> tuple[Record, ...]:
        """The records of the prompts, in the same order."""
        return self._records

    @property
    def verifiers(self) -> frozenset[str]:
        """Names of the verifiers that the prompts ask for."""
        return frozenset(record.verifier for record in self._records)

    def fingerprint(self) -> int:
        """Returns an unsigned 64-bit hash of the ordered prompt ids: another data set has another one."""
        ids = np.fromiter((record.id for record in self._records), dtype=np.uint64, count=len(self))
        return int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest(), "little")

    def _drop_bad(self, records: Sequence[Record], on_skip: OnSkip | None) -> tuple[Record, ...]:
        refused: dict[int, ValueError] = {}
        doubtful: list[int] = []
        for index, record in enumerate(records):
            try:
                if self._encoder.max_tokens(record.prompt) > self._max_tokens:
                    doubtful.append(index)
            except ValueError as error:
                refused[index] = ValueError(
                    f"the prompt of record id {record.id} cannot be made: {error}; or set data.on_bad_record='skip'"
                )
        encoded = dict(zip(doubtful, self._encoder.encode_many([records[i].prompt for i in doubtful]), strict=True))
        kept: list[Record] = []
        for index, record in enumerate(records):
            try:
                if index in refused:
                    raise refused[index]
                if index in encoded:
                    self._prompts[len(kept)] = self._to_prompt(record, encoded[index])
            except ValueError as error:
                if on_skip is None:
                    raise
                on_skip(str(error))
                continue
            kept.append(record)
        return tuple(kept)

    def _to_prompt(self, record: Record, token_ids: tuple[int, ...]) -> Prompt:
        if not 0 < len(token_ids) <= self._max_tokens:
            raise ValueError(
                f"the prompt of record id {record.id} ({record.problem[:60]!r}) has {len(token_ids)} tokens; "
                f"the rule "
                f"is 1 .. data.max_prompt_tokens={self._max_tokens}; raise that, or set "
                f"data.on_bad_record='skip'"
            )
        return Prompt(record.id, record.problem, token_ids, record.answer, record.verifier, record.metadata)


class PromptCursor:
    """Hands out prompts epoch by epoch, each epoch a new permutation that depends on (seed, epoch) only.

    The state is four integers, so a resumed run continues with exactly the prompts it would have had.
    """

    def __init__(self, prompts: PromptSet, seed: int) -> None:
        self._prompts = prompts
        self._seed = seed
        self._fingerprint = prompts.fingerprint()
        self._epoch = 0
        self._position = 0
        self._order = epoch_order(seed, 0, len(prompts))

    def next_prompts(self, count: int) -> list[Prompt]:
        """Returns the next ``count`` prompts, going on into further epochs where one ends."""
        return [self._prompts[int(index)] for index in self._next_indices(count)]

    def select_prompts(
        self, count: int, *, accept: Callable[[NDArray[np.uint64]], NDArray[np.bool_]], max_rejected: int
    ) -> tuple[list[Prompt], int]:
        """Returns (``count`` prompts, how many were passed over).

        ``accept`` says of prompt ids [P] which are wanted. At most ``max_rejected`` candidates are turned down; after
        that the next ones are taken as they come, so that a data set without a wanted prompt ends the search too.
        """
        taken: list[int] = []
        rejected: list[int] = []
        while len(taken) < count:
            if len(rejected) >= max_rejected:
                taken.extend(self._next_indices(count - len(taken)))
                break
            candidates = self._next_indices(min(count - len(taken), max_rejected - len(rejected)))
            ids = np.array([self._prompts.records[index].id for index in candidates], dtype=np.uint64)
            for index, wanted in zip(candidates, accept(ids).tolist(), strict=True):
                (taken if wanted else rejected).append(index)
        return [self._prompts[index] for index in taken], len(rejected)

    def prompts_of(self, ids: Sequence[int]) -> list[Prompt]:
        """Returns the prompts of ``ids``, in order, without moving on; ids that were drawn before.

        Raises:
            ValueError: an id is of another data set.
        """
        place = {record.id: index for index, record in enumerate(self._prompts.records)}
        unknown = [number for number in ids if number not in place]
        if unknown:
            raise ValueError(
                f"the checkpoint waits for prompt {unknown[0]:#x}, which data.train does not hold; restore the data or "
                "start a new run.output_dir"
            )
        return [self._prompts[place[number]] for number in ids]

    def state_dict(self) -> dict[str, int]:
        """Returns the state: ``{"epoch", "position", "seed", "fingerprint"}``, non-negative integers."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "seed": self._seed,
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continues from ``state``.

        Raises:
            ValueError: the state is of another data set or seed.
        """
        if state["fingerprint"] != self._fingerprint:
            raise ValueError(
                f"the checkpoint's data cursor (fingerprint {state['fingerprint']:016x}) is of another data "
                f"set than "
                f"data.train ({self._fingerprint:016x}, {len(self._prompts)} prompts); restore the data or "
                f"start a "
                f"new run.output_dir"
            )
        if state["seed"] != self._seed:
            raise ValueError(
                f"the checkpoint's data order has seed {state['seed']} and this run run.seed={self._seed}; "
                f"set run.seed={state['seed']} or start a new run.output_dir"
            )
        if not 0 <= state["position"] < len(self._prompts) or state["epoch"] < 0:
            raise ValueError(f"the checkpoint's data cursor {dict(state)} is out of range; it is damaged")
        self._epoch, self._position = state["epoch"], state["position"]
        self._order = epoch_order(self._seed, self._epoch, len(self._prompts))

    def _next_indices(self, count: int) -> list[int]:
        indices: list[int] = []
        while len(indices) < count:
            taken = self._order[self._position : self._position + count - len(indices)]
            indices.extend(taken.tolist())
            self._position += len(taken)
            if self._position == len(self._order):
                self._epoch, self._position = self._epoch + 1, 0
                self._order = epoch_order(self._seed, self._epoch, len(self._prompts))
        return indices


def epoch_order(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    """Returns the permutation of ``range(size)`` that (seed, epoch) stands for, int64 [size]."""
    return seeded_generator(seed, _ORDER_STREAM, epoch).permutation(size)


def seeded_generator(seed: int, stream: int, index: int) -> np.random.Generator:
    """Returns the random generator of (seed, stream, index); different triples give independent streams."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(stream, index)))

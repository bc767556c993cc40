"""Which completions of a run are kept, and with which numbers: some groups of every step, all of evaluation.

Every rank keeps of them those that it generated. Which groups of a step are kept depends on the step alone, so the
layout does not change it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from aer_megatron.loop.parts import TrainedBatch
from aer_megatron.report.samples import Sample, SampleWriter
from aer_megatron.types import Completion, Int64Array, ScoredGroup

_STREAM = 0x5A  # of the draw of groups: no other draw of a run has this seed

Decode = Callable[[Sequence[int]], str]


class RunSamples:
    """Keeps ``groups_per_step`` groups of each step and every completion of evaluation."""

    def __init__(self, writer: SampleWriter, decode: Decode, *, groups_per_step: int) -> None:
        self._writer = writer
        self._decode = decode
        self._texts = TokenTexts(decode)
        self._groups_per_step = groups_per_step
        self._scored: list[ScoredGroup] = []  # this rank's groups of the step under way

    def generated(self, scored: Sequence[ScoredGroup]) -> None:
        """Remembers this rank's groups until the batch that they may be part of is trained."""
        self._scored += scored

    def trained(self, step: int, batch: TrainedBatch) -> None:
        """Keeps those of this rank's groups that the step's draw takes."""
        scored, self._scored = self._scored, []
        experience = batch.experience
        first_B = np.flatnonzero(np.diff(experience.group_index_B, prepend=-1))
        taken = np.random.default_rng((_STREAM, step)).permutation(len(first_B))[: self._groups_per_step]
        for group in sorted(taken.tolist()):
            mine = _of_group(scored, batch, int(first_B[group]))
            if mine is not None:
                numbers = self._numbers(group, int(first_B[group]), len(mine.group.completions), batch)
                self._writer.write(partial(self._rows, step, "train", group, mine, numbers))

    def evaluated(self, step: int, name: str, scored: Sequence[ScoredGroup]) -> None:
        """Keeps every completion of this rank's share of the evaluation set ``name``."""
        for group, each in enumerate(scored):
            numbers = [{"logprob": completion.logprobs} for completion in each.group.completions]
            self._writer.write(partial(self._rows, step, name, group, each, numbers))

    def flush(self) -> None:
        """Waits until everything is on disk: before a checkpoint, which a resumed run goes on from."""
        self._writer.flush()

    def _numbers(self, group: int, first: int, count: int, batch: TrainedBatch) -> list[dict[str, Any]]:
        """Returns the numbers of ``count`` sequences from ``first`` on: copies, for the batch is not kept."""
        end_B = np.cumsum(batch.experience.sampled_length_B)
        result: list[dict[str, Any]] = []
        for sequence in range(first, first + count):
            tokens = slice(int(end_B[sequence - 1]) if sequence else 0, int(end_B[sequence]))
            result.append(
                {
                    "logprob": tuple(batch.scores.logprob_T[tokens].tolist()),
                    "token_entropy": tuple(batch.scores.token_entropy_T[tokens].tolist()),
                    "advantage": float(batch.advantage_B[sequence]),
                    "difficulty": float(batch.difficulty_P[group]),
                    "entropy_weight": float(batch.entropy_weight_B[sequence]),
                }
            )
        return result

    def _rows(
        self, step: int, name: str, group: int, scored: ScoredGroup, numbers: Sequence[dict[str, Any]]
    ) -> list[Sample]:
        """Returns the rows of a group; called beside the run."""
        prompt = scored.group.prompt
        question = self._decode(prompt.token_ids)
        none = dict.fromkeys(("advantage", "difficulty", "entropy_weight", "token_entropy"))
        rows = []
        for completion, verdict, own in zip(scored.group.completions, scored.verdicts, numbers, strict=True):
            text, ends = self._texts.of(completion.token_ids)
            versions = [span.version for span in completion.policy_versions]
            rows.append(
                Sample(
                    step=step,
                    set=name,
                    prompt_id=prompt.id,
                    group=group,
                    prompt=question,
                    answer=prompt.answer,
                    completion=text,
                    token_ids=completion.token_ids,
                    sampled=_sampled(completion),
                    token_ends=ends,
                    reward=verdict.reward,
                    reason=verdict.reason,
                    policy_version_min=min(versions),
                    policy_version_max=max(versions),
                    truncated=completion.finish_reason == "length",
                    **{**none, **own},
                )
            )
        return rows


class TokenTexts:
    """Decodes completions and says where the text of each token ends; remembers the text of single tokens."""

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._alone: dict[int, str] = {}

    def of(self, token_ids: Sequence[int]) -> tuple[str, tuple[int, ...]]:
        """Returns (the text, where each token's ends in it). A token that ends within a character ends before it."""
        text = self._decode(token_ids)
        for token in token_ids:
            if token not in self._alone:
                self._alone[token] = self._decode((token,))
        pieces = [self._alone[token] for token in token_ids]
        if "".join(pieces) == text:  # no character is spread over tokens, no token is written otherwise at a start
            return text, tuple(itertools.accumulate(map(len, pieces)))
        return text, token_ends(token_ids, text, self._decode)


def token_ends(token_ids: Sequence[int], text: str, decode: Decode) -> tuple[int, ...]:
    """Returns where the text of each token ends in ``text``, which all of them decode to.

    A token that ends within a character ends before it. Tokens are decoded with the one in front of them, as some
    tokenizers write a token in another way where a text begins; never more than a few at once.
    """
    ends: list[int] = []
    context = start = base = 0  # tokens before ``start`` end at character ``base``
    for place in range(len(token_ids)):
        known = decode(token_ids[context:start])
        piece = decode(token_ids[context : place + 1])
        whole = piece.rstrip("\ufffd")
        length = max(len(whole) - len(known), 0)
        ends.append(max(min(base + length, len(text)), ends[-1] if ends else 0))
        if whole == piece or place + 1 - start >= 8:  # no character of more than 4 bytes is waited for
            base, context, start = ends[-1], start, place + 1
    if ends:
        ends[-1] = len(text)
    return tuple(ends)


def _of_group(scored: Sequence[ScoredGroup], batch: TrainedBatch, first: int) -> ScoredGroup | None:
    """Returns the group of this rank whose first sequence is ``first`` of the batch; None: another rank has it."""
    experience = batch.experience
    for each in scored:
        if each.group.prompt.id == int(experience.prompt_id_B[first]):
            tokens = each.group.prompt.token_ids + each.group.completions[0].token_ids
            start = int(experience.length_B[:first].sum())
            here: Int64Array = experience.token_ids_L[start : start + int(experience.length_B[first])]
            if np.array_equal(here, tokens):
                return each
    return None


def _sampled(completion: Completion) -> tuple[bool, ...] | None:
    spans = completion.policy_versions
    if sum(span.end - span.start for span in spans) == len(completion.token_ids):
        return None
    return tuple(any(span.start <= place < span.end for span in spans) for place in range(len(completion.token_ids)))

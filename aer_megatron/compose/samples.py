"""Which completions of a run are kept, and with which numbers: some groups of every step, all of evaluation.

Every rank keeps of them those that it generated. Which groups of a step are kept depends on the step alone, so the
layout does not change it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

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
                self._writer.write(list(self._trained_rows(step, group, mine, batch, int(first_B[group]))))

    def evaluated(self, step: int, name: str, scored: Sequence[ScoredGroup]) -> None:
        """Keeps every completion of this rank's share of the evaluation set ``name``."""
        for group, each in enumerate(scored):
            rows = [
                self._row(step, name, group, each, place, logprob=completion.logprobs)
                for place, completion in enumerate(each.group.completions)
            ]
            self._writer.write(rows)

    def flush(self) -> None:
        """Waits until everything is on disk: before a checkpoint, which a resumed run goes on from."""
        self._writer.flush()

    def _trained_rows(
        self, step: int, group: int, scored: ScoredGroup, batch: TrainedBatch, first: int
    ) -> Iterator[Sample]:
        end_B = np.cumsum(batch.experience.sampled_length_B)
        for place in range(len(scored.group.completions)):
            sequence = first + place
            tokens = slice(int(end_B[sequence - 1]) if sequence else 0, int(end_B[sequence]))
            yield self._row(
                step,
                "train",
                group,
                scored,
                place,
                logprob=batch.scores.logprob_T[tokens].tolist(),
                token_entropy=tuple(batch.scores.token_entropy_T[tokens].tolist()),
                advantage=float(batch.advantage_B[sequence]),
                difficulty=float(batch.difficulty_P[group]),
                entropy_weight=float(batch.entropy_weight_B[sequence]),
            )

    def _row(
        self,
        step: int,
        name: str,
        group: int,
        scored: ScoredGroup,
        place: int,
        *,
        logprob: Sequence[float],
        token_entropy: tuple[float, ...] | None = None,
        **numbers: float,
    ) -> Sample:
        prompt, completion = scored.group.prompt, scored.group.completions[place]
        text = self._decode(completion.token_ids)
        versions = [span.version for span in completion.policy_versions]
        none = dict.fromkeys(("advantage", "difficulty", "entropy_weight"))
        return Sample(
            step=step,
            set=name,
            prompt_id=prompt.id,
            group=group,
            prompt=prompt.problem,
            answer=prompt.answer,
            completion=text,
            token_ids=completion.token_ids,
            sampled=_sampled(completion),
            token_ends=token_ends(completion.token_ids, text, self._decode),
            reward=scored.verdicts[place].reward,
            reason=scored.verdicts[place].reason,
            logprob=tuple(logprob),
            token_entropy=token_entropy,
            policy_version_min=min(versions),
            policy_version_max=max(versions),
            truncated=completion.finish_reason == "length",
            **{**none, **numbers},
        )


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

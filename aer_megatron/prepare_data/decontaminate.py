"""Training problems that an evaluation set has, too: by their normal form, and by sequences of words in common.

    identical   the same text, character for character
    exact       the same but for blanks, dollar signs, TeX's spacing and capitals
    ngram       at least a share of the evaluation problem's sequences of n words are in the training problem

One sequence in common says little: "where m and n are relatively prime positive integers" is in hundreds of problems.
So it is the share of an evaluation problem's sequences that counts.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from aer_megatron.prepare_data.normal_form import essence, words
from aer_megatron.prepare_data.problems import Problem, ProblemFile


class Hit(NamedTuple):
    """A training problem and the evaluation problem that it resembles most."""

    train: Problem
    against: str  # the evaluation set's file
    evaluation: Problem
    kind: str  # "identical", "exact" or "ngram"
    share: float  # of the evaluation problem's sequences that the training problem has


class _Held(NamedTuple):
    against: str
    problem: Problem
    num_sequences: int


class HeldOut:
    """The problems of the evaluation sets, ready to be looked up.

    Args:
        n: words of a sequence; an evaluation problem with fewer is one sequence, and must be all of the other's words.
        share: sequences of an evaluation problem, of all it has, from which on a training problem is a hit; above 0.
    """

    def __init__(self, files: Sequence[ProblemFile], *, n: int, share: float) -> None:
        self._n = n
        self._share = share
        self._held: list[_Held] = []
        self._by_essence: dict[str, list[int]] = defaultdict(list)
        self._by_sequence: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for file in files:
            for problem in file.problems:
                sequences = _sequences(words(problem.text), n)
                for sequence in sequences:
                    self._by_sequence[sequence].append(len(self._held))
                self._by_essence[essence(problem.text)].append(len(self._held))
                self._held.append(_Held(str(file.path), problem, len(sequences)))

    def find(self, train: Problem) -> Hit | None:
        """Returns the hit of a training problem: exact ones first, then the largest share; None where it has none."""
        counts = Counter(
            index
            for sequence in _sequences(words(train.text), self._n)
            for index in self._by_sequence.get(sequence, ())
        )
        shares = {index: count / self._held[index].num_sequences for index, count in counts.items()}
        same = self._by_essence.get(essence(train.text))
        if same:
            index = next((index for index in same if self._held[index].problem.text == train.text), same[0])
            kind = "identical" if self._held[index].problem.text == train.text else "exact"
            return self._hit(train, index, kind, shares)
        index = max(shares, key=lambda index: (shares[index], -index), default=-1)
        return self._hit(train, index, "ngram", shares) if shares.get(index, 0.0) >= self._share else None

    def _hit(self, train: Problem, index: int, kind: str, shares: Mapping[int, float]) -> Hit:
        held = self._held[index]
        return Hit(train, held.against, held.problem, kind, shares.get(index, 0.0))


def _sequences(found: Sequence[str], n: int) -> set[tuple[str, ...]]:
    """Returns the different sequences of ``n`` words; all words as one where there are fewer."""
    if len(found) < n:
        return {tuple(found)} if found else set()
    return {tuple(found[start : start + n]) for start in range(len(found) - n + 1)}

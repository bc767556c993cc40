"""Countdown-style arithmetic: four numbers 1-9, a target 0-99, each number used exactly once with + - *.

A problem is the text ``"a,b,c,d=target>"``, an answer an expression without parentheses, ``*`` before ``+``
and ``-``, e.g. ``3+5*2-8``. Every expression of four numbers is one of 4! orders x 3^3 operators = 648, so
all values of all 495 multisets fit in one small table, and a problem's solutions are a row lookup.

The train and eval splits are disjoint by construction: a hash of (multiset of numbers, target) decides the
side, so no evaluation problem is a training problem with its numbers in another order.

Shape suffixes: M multisets (495), E expressions per multiset (648), N items, B batch.

This file does NOT judge answers: rewards/countdown.py does, with a parser of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations_with_replacement, permutations, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

Int16Array = NDArray[np.int16]
Int64Array = NDArray[np.int64]

_NUM_NUMBERS = 4
_MAX_NUMBER = 9
_NUM_TARGETS = 100
_EVAL_ONE_IN = 16  # share of (multiset, target) pairs held out for evaluation
_OPERATORS = "+-*"
_ORDERS = np.array(list(permutations(range(_NUM_NUMBERS))), dtype=np.int64)
_OPERATOR_TRIPLES = np.array(list(product(range(3), repeat=_NUM_NUMBERS - 1)), dtype=np.int64)
_MULTISETS = np.array(list(combinations_with_replacement(range(1, _MAX_NUMBER + 1), _NUM_NUMBERS)), dtype=np.int64)


@dataclass(frozen=True, slots=True)
class CountdownItems:
    """N problems with the table that solves them.

    ``number_N4`` holds the numbers in the order shown, ``target_N`` the targets, ``row_N`` the multiset's row
    in ``value_ME``.
    """

    number_N4: Int64Array
    target_N: Int64Array
    row_N: Int64Array
    value_ME: Int16Array

    def __len__(self) -> int:
        return int(self.target_N.shape[0])

    def texts(self) -> tuple[list[str], list[str]]:
        """Returns the problem texts and the answers (the targets, as text)."""
        targets = [str(t) for t in self.target_N.tolist()]
        problems = [
            f"{a},{b},{c},{d}={target}>" for (a, b, c, d), target in zip(self.number_N4.tolist(), targets, strict=True)
        ]
        return problems, targets


def generate(*, size: int, seed: int, options: Mapping[str, Any]) -> CountdownItems:
    """Returns ``size`` different solvable problems of ``options["split"]`` ("train" or "eval"), seeded.

    Drawn without replacement so that every ordered tuple of numbers is equally likely, and every target that
    is reachable from it (exponential keys divided by weights, Efraimidis and Spirakis 2006).

    Raises:
        ValueError: the split is missing or unknown, an option is, or the split holds fewer than ``size``
            problems.
    """
    split = options.get("split")
    if split not in ("train", "eval") or set(options) != {"split"}:
        raise ValueError(
            f"options={dict(options)} of task='countdown' must be exactly split='train' or split='eval'; "
            f"the two are disjoint"
        )
    value_ME = _expression_values()
    reachable_MT = (value_ME[:, :, None] == np.arange(_NUM_TARGETS, dtype=np.int16)).any(axis=1)
    numbers = np.array(list(product(range(1, _MAX_NUMBER + 1), repeat=_NUM_NUMBERS)), dtype=np.int64)
    row = _row_of(numbers)
    weight = 1.0 / reachable_MT.sum(axis=1)
    tuple_index, target = np.nonzero((reachable_MT & (_is_eval() == (split == "eval")))[row])
    if size > target.shape[0]:
        raise ValueError(
            f"size={size} is more than the {target.shape[0]} problems of task='countdown', split={split!r}; lower it"
        )
    keys = np.random.default_rng(seed).exponential(size=target.shape[0]) / weight[row[tuple_index]]
    chosen = np.argsort(keys, kind="stable")[:size]
    index = tuple_index[chosen]
    return CountdownItems(numbers[index], target[chosen].astype(np.int64), row[index], value_ME)


def random_solution(items: CountdownItems, index: int, rng: np.random.Generator) -> str:
    """Returns one solution of item ``index``, uniform among its different solutions.

    Example: ``"3+5*2-8"`` for a problem ``"3,5,2,8=5>"``.
    """
    return bytes(random_solutions(items, np.array([index]), rng)[0].tolist()).decode()


def random_solutions(items: CountdownItems, index_B: Int64Array, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Returns one random solution per item as ASCII codes, uint8 [B, 7].

    Uniform among the different solution texts: equal numbers make several table columns spell one text, but
    the same number of columns for every text of a multiset, so a uniform column is a uniform text.
    """
    row_B = items.row_N[index_B]
    solves_BE = items.value_ME[row_B] == items.target_N[index_B, None]
    rank_BE = np.cumsum(solves_BE, axis=1, dtype=np.int16)
    wanted_B = rng.integers(1, rank_BE[:, -1].astype(np.int64) + 1)
    column_B = np.argmax(rank_BE >= wanted_B[:, None], axis=1)
    order_B, operators_B = np.divmod(column_B, len(_OPERATOR_TRIPLES))
    numbers_B4 = np.take_along_axis(_MULTISETS[row_B], _ORDERS[order_B], axis=1)
    text = np.empty((len(index_B), 2 * _NUM_NUMBERS - 1), dtype=np.uint8)
    text[:, 0::2] = numbers_B4 + ord("0")
    text[:, 1::2] = np.frombuffer(_OPERATORS.encode(), dtype=np.uint8)[_OPERATOR_TRIPLES[operators_B]]
    return text


def _expression_values() -> Int16Array:
    """Returns every expression's value for every multiset, int16 [M, E]; column = order * 27 + operators."""
    numbers = _MULTISETS[:, _ORDERS]
    values = np.empty((*numbers.shape[:2], len(_OPERATOR_TRIPLES)), dtype=np.int16)
    for column, operators in enumerate(_OPERATOR_TRIPLES.tolist()):
        total, product_ = np.zeros_like(numbers[:, :, 0]), numbers[:, :, 0]
        for position, operator in enumerate(operators, start=1):
            number = numbers[:, :, position]
            if _OPERATORS[operator] == "*":
                product_ = product_ * number
            else:
                total = total + product_
                product_ = number if _OPERATORS[operator] == "+" else -number
        values[:, :, column] = total + product_
    return values.reshape(len(_MULTISETS), -1)


def _row_of(numbers_N4: Int64Array) -> Int64Array:
    """Returns the row of each tuple's multiset in ``_MULTISETS``."""
    code = 10 ** np.arange(_NUM_NUMBERS - 1, -1, -1)
    return np.searchsorted(_MULTISETS @ code, np.sort(numbers_N4, axis=1) @ code)


def _is_eval() -> NDArray[np.bool_]:
    """Returns which (multiset, target) pairs are held out, bool [M, 100]: a fixed hash (splitmix64)."""
    shape = (len(_MULTISETS), _NUM_TARGETS)
    z = np.arange(1, shape[0] * shape[1] + 1, dtype=np.uint64).reshape(shape) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    held_out: NDArray[np.bool_] = (z ^ (z >> np.uint64(31))) % np.uint64(_EVAL_ONE_IN) == 0
    return held_out

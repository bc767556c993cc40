"""Sets of real numbers: intervals, inequalities of one variable, unions of them, and whether two are the same."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import mpmath

from aer_megatron.rewards.answers.nodes import (
    Call,
    Chain,
    Group,
    Many,
    Node,
    SetOf,
    Sym,
    difference,
    negated,
    variables,
)
from aer_megatron.rewards.answers.values import close, evaluate_with, is_infinite, number_of

_DIGITS = 40


@dataclass(frozen=True, slots=True)
class Piece:
    """From ``low`` to ``high``; ``closed`` says of each end whether it belongs to the piece."""

    low: Any
    high: Any
    closed: tuple[bool, bool]


Region = tuple[Piece, ...]  # disjoint, in order
ALL: Region = (Piece(mpmath.mpf("-inf"), mpmath.mpf("inf"), (False, False)),)


def region_of(node: Node) -> Region | None:
    """Returns the set of reals that an answer describes, or None where it describes none."""
    try:
        return _region(node)
    except (ValueError, ArithmeticError, OverflowError, TypeError):
        return None


def same_region(a: Region, b: Region) -> bool:
    """Returns whether two sets have the same pieces."""
    return len(a) == len(b) and all(
        x.closed == y.closed and close(x.low, y.low, 25) and close(x.high, y.high, 25)
        for x, y in zip(a, b, strict=True)
    )


def variable_of(node: Node) -> str | None:
    """Returns the one variable that inequalities are about, None for bare intervals."""
    names: set[str] = set()
    for chain in _chains(node):
        names |= variables(chain) - {"bbR"}
    return names.pop() if len(names) == 1 else None


def _chains(node: Node) -> list[Chain]:
    if isinstance(node, Chain):
        return [node]
    if isinstance(node, Many):
        return [chain for item in node.items for chain in _chains(item)]
    if isinstance(node, SetOf):
        return [chain for part in node.parts for chain in _chains(part)]
    return []


def _region(node: Node) -> Region | None:
    match node:
        case Sym("bbR"):
            return ALL
        case Group(left, (low, high), right):
            return _interval(left, low, high, right)
        case Chain(sides, relations):
            return _inequalities(sides, relations)
        case Many(items, joined_by) if items:
            parts = _known(_region(item) for item in items)
            if parts is None:
                return None
            # "0 < x < 9, x != 2" means both; "x < 1, x > 2" means either
            excludes = any(isinstance(item, Chain) and item.relations == ("!=",) for item in items)
            return _intersection(parts) if joined_by == "and" or excludes else _union(parts)
        case SetOf("cup", items):
            parts = _known(_region(item) or _points(item) for item in items)
            return None if parts is None else _union(parts)
        case SetOf("cap", (a, b)):
            first, second = _region(a), _region(b)
            return None if first is None or second is None else _intersection([first, second])
        case SetOf("setminus", (a, b)):
            whole, without = _region(a), _region(b) or _points(b)
            return None if whole is None or without is None else _intersection([whole, _complement(without)])
    return None


def _known(regions: Iterable[Region | None]) -> list[Region] | None:
    """Returns the regions, None where one of them is none."""
    found = list(regions)
    known = [region for region in found if region is not None]
    return known if len(known) == len(found) else None


def _points(node: Node) -> Region | None:
    items = node.items if isinstance(node, Many) else (node,)
    values = sorted((_real(item) for item in items), key=_order)
    return tuple(Piece(value, value, (True, True)) for value in values)


def _interval(left: str, low: Node, high: Node, right: str) -> Region | None:
    a, b = _real(low), _real(high)
    if not _order(a) <= _order(b):
        return None
    closed = (left == "[" and not is_infinite(a), right == "]" and not is_infinite(b))
    if a == b and not all(closed):
        return None
    return (Piece(a, b, closed),)


def _real(node: Node) -> Any:
    value = number_of(node, _DIGITS)
    if not isinstance(value, Fraction):
        if mpmath.im(value) != 0:
            raise ValueError("not a real number")
        value = mpmath.re(value)
    return value


def _order(value: Any) -> Any:
    return mpmath.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


# -- inequalities -----------------------------------------------------------------------------------------------------


def _inequalities(sides: tuple[Node, ...], relations: tuple[str, ...]) -> Region | None:
    if relations == ("in",) and isinstance(sides[0], Sym):
        return _region(sides[1])
    if not all(relation in ("<", "<=", ">", ">=", "!=") for relation in relations):
        return None
    parts = _known(map(_inequality, sides, relations, sides[1:]))
    return None if parts is None else _intersection(parts)


def _inequality(left: Node, relation: str, right: Node) -> Region | None:
    absolute = _absolute(left, relation, right)
    if absolute is not None:
        return absolute
    gap = difference(left, right)
    names = sorted(variables(gap))
    if len(names) != 1:
        return None
    for infinite, side in ((right, relation), (left, _turned(relation))):
        if infinite in (Sym("infty"), negated(Sym("infty"))) and side in ("<", ">"):
            return ALL
    slope, offset = _line(gap, names[0])
    boundary = -offset / slope
    if relation == "!=":
        return _complement((Piece(boundary, boundary, (True, True)),))
    if slope < 0:
        relation = _turned(relation)
    includes = relation.endswith("=")
    if relation.startswith("<"):
        return (Piece(mpmath.mpf("-inf"), boundary, (False, includes)),)
    return (Piece(boundary, mpmath.mpf("inf"), (includes, False)),)


def _absolute(left: Node, relation: str, right: Node) -> Region | None:
    """|u| < c and |u| > c with a linear u."""
    if isinstance(right, Call) and right.name == "abs":
        left, relation, right = right, _turned(relation), left
    if not (isinstance(left, Call) and left.name == "abs") or variables(right) or relation == "!=":
        return None
    inner, minus = left.arguments[0], negated(right)
    inside, outside = ("<", ">") if not relation.endswith("=") else ("<=", ">=")
    if relation.startswith("<"):
        parts = _known([_inequality(inner, inside, right), _inequality(inner, outside, minus)])
        return None if parts is None else _intersection(parts)
    parts = _known([_inequality(inner, outside, right), _inequality(inner, inside, minus)])
    return None if parts is None else _union(parts)


def _line(node: Node, name: str) -> tuple[Any, Any]:
    """Returns (slope, offset) of a linear expression of one variable. Raises ValueError where it is not linear."""
    at = [evaluate_with(node, {name: Fraction(x)}, _DIGITS) for x in (0, 1, 2, -5)]
    slope = at[1] - at[0]
    if slope == 0 or not close(at[2] - at[1], slope, 25) or not close(at[0] - at[3], 5 * slope, 25):
        raise ValueError("not linear")
    return slope, at[0]


def _turned(relation: str) -> str:
    return {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "!=": "!="}[relation]


# -- algebra of sets --------------------------------------------------------------------------------------------------


def _union(regions: list[Region]) -> Region:
    pieces = sorted((piece for region in regions for piece in region), key=lambda p: (_order(p.low), not p.closed[0]))
    merged: list[Piece] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        if last is None or not _touch(last, piece):
            merged.append(piece)
            continue
        end = max((last, piece), key=lambda p: (_order(p.high), p.closed[1]))
        merged[-1] = Piece(last.low, end.high, (last.closed[0], end.closed[1]))
    return tuple(merged)


def _touch(a: Piece, b: Piece) -> bool:
    if close(a.high, b.low, 25):
        return a.closed[1] or b.closed[0]
    return bool(_order(b.low) < _order(a.high))


def _complement(region: Region) -> Region:
    low, closed, gaps = mpmath.mpf("-inf"), False, []
    for piece in region:
        if _order(low) < _order(piece.low) or (closed and not piece.closed[0] and close(low, piece.low, 25)):
            gaps.append(Piece(low, piece.low, (closed, not piece.closed[0] and not is_infinite(piece.low))))
        low, closed = piece.high, not piece.closed[1]
    if not is_infinite(low):
        gaps.append(Piece(low, mpmath.mpf("inf"), (closed, False)))
    return tuple(gaps)


def _intersection(regions: list[Region]) -> Region:
    return _complement(_union([_complement(region) for region in regions]))

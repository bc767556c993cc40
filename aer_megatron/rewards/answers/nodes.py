"""What an answer is made of: frozen trees, from numbers to lists of intervals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction


@dataclass(frozen=True, slots=True)
class Num:
    value: Fraction


@dataclass(frozen=True, slots=True)
class Sym:
    """A variable, a constant (``pi``, ``e``, ``i``, ``infty``) or a named thing such as ``bbZ_4``."""

    name: str


@dataclass(frozen=True, slots=True)
class Sum:
    terms: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Product:
    factors: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Power:
    base: Node
    exponent: Node


@dataclass(frozen=True, slots=True)
class Call:
    """A function of known meaning: ``sqrt``, ``ln``, ``abs``, ``factorial``, ``binom``, ``floor`` ..."""

    name: str
    arguments: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """``plus_minus``: 1 for \\pm, -1 for \\mp; all of an answer are chosen together."""

    plus_minus: int
    term: Node


@dataclass(frozen=True, slots=True)
class Based:
    """Digits of a number to a base: 52_8."""

    digits: str
    base: str


@dataclass(frozen=True, slots=True)
class Measured:
    """A value with its unit ("in^2") or the noun that it counts."""

    value: Node
    unit: str


@dataclass(frozen=True, slots=True)
class Group:
    """Ordered items in brackets: a tuple, a vector, an interval. ``left`` and ``right`` are ( [ ] )."""

    left: str
    items: tuple[Node, ...]
    right: str


@dataclass(frozen=True, slots=True)
class Many:
    """Items of a list or a set, in no order."""

    items: tuple[Node, ...]
    joined_by: str = ","  # "or", "and" where words join them


@dataclass(frozen=True, slots=True)
class Matrix:
    rows: tuple[tuple[Node, ...], ...]


@dataclass(frozen=True, slots=True)
class Ratio:
    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Chain:
    """``sides`` joined by relations: = < <= > >= != in."""

    sides: tuple[Node, ...]
    relations: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SetOf:
    """``operator`` cup, cap or setminus over sets."""

    operator: str
    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Words:
    """A text: its spelling without case, blanks and articles."""

    text: str


Node = (
    Num
    | Sym
    | Sum
    | Product
    | Power
    | Call
    | Choice
    | Based
    | Measured
    | Group
    | Many
    | Matrix
    | Ratio
    | Chain
    | SetOf
    | Words
)

MINUS_ONE = Num(Fraction(-1))
CONSTANTS = frozenset(("pi", "e", "i", "infty"))


def children(node: Node) -> tuple[Node, ...]:
    """Returns the trees directly below a node."""
    match node:
        case (
            Sum(items)
            | Product(items)
            | Ratio(items)
            | Many(items)
            | SetOf(_, items)
            | Call(_, items)
            | Chain(items, _)
        ):
            return items
        case Group(_, items, _):
            return items
        case Power(base, exponent):
            return (base, exponent)
        case Choice(_, inner) | Measured(inner, _):
            return (inner,)
        case Matrix(rows):
            return tuple(item for row in rows for item in row)
        case _:
            return ()


def variables(node: Node) -> set[str]:
    """Returns the names in a tree that are no constants."""
    return symbols(node) - CONSTANTS


def symbols(node: Node) -> set[str]:
    """Returns the names in a tree, constants included."""
    if isinstance(node, Sym):
        return {node.name}
    return set().union(*(symbols(child) for child in children(node))) if children(node) else set()


def rebuilt(node: Node, change: Callable[[Node], Node]) -> Node:
    """Returns the tree with ``change`` applied to the trees directly below it."""
    match node:
        case Sum(terms):
            return Sum(tuple(map(change, terms)))
        case Product(factors):
            return Product(tuple(map(change, factors)))
        case Power(base, exponent):
            return Power(change(base), change(exponent))
        case Call(name, arguments):
            return Call(name, tuple(map(change, arguments)))
        case Measured(value, _):
            return replace(node, value=change(value))
    return node


def negated(node: Node) -> Node:
    """Returns minus a tree."""
    return Product((MINUS_ONE, node))


def difference(left: Node, right: Node) -> Node:
    """Returns ``left`` minus ``right``."""
    return Sum((left, negated(right)))

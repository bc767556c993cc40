"""Equations and inequalities: a name and its value, curves, chains.

``same`` compares what stands on their sides; it is the judge's (judge.py), of whose rules these are a part.
"""

from __future__ import annotations

from collections.abc import Callable

from aer_megatron.rewards.answers.nodes import (
    Chain,
    Group,
    Node,
    Product,
    SetOf,
    Sym,
    Words,
    difference,
    rebuilt,
    symbols,
    variables,
)
from aer_megatron.rewards.answers.values import constant_ratio

Same = Callable[[Node, Node], bool]

_TURNED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}


def same_chain(gold: Node, answer: Node, same: Same) -> bool:
    """Returns whether two answers of which one is a chain are the same.

    ``name = value`` is its value; other equations are curves, equal up to a factor; other relations are equal side by
    side.
    """
    if isinstance(gold, Chain) and isinstance(answer, Chain):
        if set(gold.relations) | set(answer.relations) <= {"="}:
            return _same_equation(gold, answer, same)
        return _same_sides(gold, answer, same) or same_inequality(gold, answer, same)
    chain, other = (gold, answer) if isinstance(gold, Chain) else (answer, gold)
    value = _value(chain, same) if isinstance(chain, Chain) else None
    if value is None:
        return False
    return same(value, other) if chain is gold else same(other, value)


def contradicts(chain: Chain, same: Same) -> bool:
    """Returns whether a chain of constants is false: 7 = 8."""
    return _is_constant(chain) and set(chain.relations) == {"="} and _value(chain, same) is None


def same_inequality(gold: Node, answer: Node, same: Same) -> bool:
    """Returns whether inequalities of several variables are equal up to a positive factor, or unions part by part."""
    match gold, answer:
        case Chain((_, _), (_,)), Chain((_, _), (_,)):
            (a, b), first = _upwards(gold)
            (c, d), second = _upwards(answer)
            if first != second or first[0] not in ("<", "<=", "!="):
                return _same_sides(gold, answer, same)
            ratio = constant_ratio(difference(a, b), difference(c, d))
            return ratio is not None and (first[0] == "!=" or bool(ratio.real > 0))
        case Chain(), Chain():
            first_sides, first_relations = _upwards(gold)
            second_sides, second_relations = _upwards(answer)
            return first_relations == second_relations and all_same(first_sides, second_sides, same)
        case SetOf(operator, parts), SetOf(other, others) if operator == other:
            turned = operator != "setminus" and all_same(parts, tuple(reversed(others)), same)
            return turned or all_same(parts, others, same)
    return False


def all_same(first: tuple[Node, ...], second: tuple[Node, ...], same: Same) -> bool:
    """Returns whether items are the same one by one."""
    return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))


def _upwards(chain: Chain) -> tuple[tuple[Node, ...], tuple[str, ...]]:
    """Returns sides and relations of a chain, turned so that it does not begin with "greater"."""
    if chain.relations[0] not in (">", ">="):
        return chain.sides, chain.relations
    return tuple(reversed(chain.sides)), tuple(
        _TURNED.get(relation, relation) for relation in reversed(chain.relations)
    )


def _same_sides(gold: Chain, answer: Chain, same: Same) -> bool:
    return gold.relations == answer.relations and all_same(gold.sides, answer.sides, same)


def _same_equation(gold: Chain, answer: Chain, same: Same) -> bool:
    first, second = _value(gold, same), _value(answer, same)
    if first is not None and second is not None:
        first, second = _of_one_argument(gold, first, answer, second)
        if same(first, second):
            return True
    if len(gold.sides) == len(answer.sides) == 2:
        curves = difference(gold.sides[0], gold.sides[1]), difference(answer.sides[0], answer.sides[1])
        if len(variables(curves[0])) >= 2 or (first is None and second is None):
            return constant_ratio(*curves) is not None
    return first is None and second is None and _same_sides(gold, answer, same)


def _of_one_argument(gold: Chain, first: Node, answer: Chain, second: Node) -> tuple[Node, Node]:
    """f(t) = t + 1 is f(x) = x + 1: the argument of a definition may have any name."""
    wanted, given = _argument_name(gold.sides[0]), _argument_name(answer.sides[0])
    if wanted and given and wanted != given and wanted not in symbols(second):
        return first, renamed(second, given, wanted)
    return first, second


def _argument_name(side: Node) -> str | None:
    match side:
        case Product((Sym(), Sym(argument))):
            return argument
    return None


def renamed(node: Node, old: str, new: str) -> Node:
    """Returns a formula with another name for one of its variables."""
    if node == Sym(old):
        return Sym(new)
    return rebuilt(node, lambda child: renamed(child, old, new))


def _value(chain: Chain, same: Same) -> Node | None:
    """Returns the value that a chain of equations ends in, None where it names none or contradicts itself."""
    if set(chain.relations) != {"="}:
        return None
    sides, named = list(chain.sides), None
    if _is_name(sides[0]):
        named, sides = sides[0], sides[1:]
    elif _is_name(sides[-1]):
        named, sides = sides[-1], sides[:-1]
    elif not _is_constant(chain):
        return None
    if any(not same(sides[-1], side) for side in sides[:-1]):
        return None
    return None if isinstance(named, Sym) and named.name in symbols(sides[-1]) else sides[-1]


def _is_name(side: Node) -> bool:
    """x, x_1, f(x), f(2), angle A, (x, y): what a value is given to."""
    match side:
        case Sym(name):
            return name not in ("pi", "infty", "i")
        case Product((Sym(), _)) | Product((Sym(), Sym(), _)) | Words():
            return True
        case Group("(", items, ")"):
            return all(isinstance(item, Sym) for item in items)
    return False


def _is_constant(chain: Chain) -> bool:
    return not any(variables(side) for side in chain.sides)

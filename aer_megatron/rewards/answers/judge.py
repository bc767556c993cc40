"""Is an answer the gold answer? The conventions:

    value      equal in any closed form; decimals are exact; a bare sum of numbers is no answer
    units      may be missing on either side, like degree, dollar and percent signs; two different ones are wrong
    lists      unordered and complete; tuples, ratios, intervals and matrices ordered
    equations  name = value is the value; curves are equal up to a factor; a false chain is wrong
    regions    intervals and inequalities of one variable are the same answer
    words      case, blanks, articles and a final period do not matter, the order of letters does

This file does NOT look for the answer in a completion (rewards/extract.py).
"""

from __future__ import annotations

import itertools
from fractions import Fraction

from aer_megatron.rewards.answers import grammar
from aer_megatron.rewards.answers.equations import all_same, contradicts, renamed, same_chain, same_inequality
from aer_megatron.rewards.answers.nodes import (
    MINUS_ONE,
    Based,
    Call,
    Chain,
    Choice,
    Group,
    Many,
    Matrix,
    Measured,
    Node,
    Num,
    Power,
    Product,
    Ratio,
    SetOf,
    Sum,
    Sym,
    Words,
    children,
    negated,
    rebuilt,
    variables,
)
from aer_megatron.rewards.answers.regions import region_of, same_region, variable_of
from aer_megatron.rewards.answers.spelling import MAX_LENGTH, Token, has_groups, tokens_of
from aer_megatron.rewards.answers.texts import by_words, spelling
from aer_megatron.rewards.answers.values import close, equal, number_of, variants
from aer_megatron.rewards.answers.words import SINGLE_LETTER_UNITS, is_measure

_MAX_ITEMS = 200


def matches(gold: str, answer: str) -> bool:
    """Returns whether ``answer``, the content of a box, is the ``gold`` answer.

    Example: ``matches(r"\\frac{1}{2}", "0.5")`` and ``matches("(2,4)", "2 < x < 4")``
    """
    if not answer.strip() or len(answer) > MAX_LENGTH or len(gold) > MAX_LENGTH:
        return bool(answer.strip()) and answer.split() == gold.split()
    try:
        gold_tokens, answer_tokens = tokens_of(gold), tokens_of(answer)
    except (ValueError, RecursionError):
        return answer.split() == gold.split()
    if (
        not any(token.kind != "mark" or token.value.isalnum() for token in answer_tokens)
        and gold.strip() != answer.strip()
    ):
        return False
    gold_text, answer_text = grammar.text_of(gold_tokens), grammar.text_of(answer_tokens)
    if spelling(gold_tokens) == spelling(answer_tokens):
        return True
    verdict = by_words(gold_tokens, answer_tokens, gold_text, answer_text)
    if verdict is not None:
        return verdict
    readings = [(gold_tokens, answer_tokens)]
    if any(token.kind == "word" for token in answer_tokens) and not any(token.kind == "word" for token in gold_tokens):
        readings.append((gold_tokens, tokens_of(answer, words=False)))  # acb is a product where abc is one
    if has_groups(gold) or has_groups(answer):
        readings += _other_readings(gold, answer, gold_tokens)
    return any(_same_tokens(*reading) for reading in readings)


def can_be_read(gold: str) -> bool:
    """Returns whether a gold answer is a sentence of the grammar; others are compared as texts only."""
    if len(gold) > MAX_LENGTH:
        return False
    try:
        grammar.parse(tokens_of(gold))
    except (ValueError, RecursionError):
        return False
    return True


# -- readings ---------------------------------------------------------------------------------------------------


def _other_readings(gold: str, answer: str, gold_tokens: list[Token]) -> list[tuple[list[Token], list[Token]]]:
    """Commas before three digits cut a list inside of brackets, or where there are many of them: 101,103,107."""
    cut_gold, cut_answer = tokens_of(gold, grouped=False), tokens_of(answer, grouped=False)
    if has_groups(gold):
        return [(cut_gold, cut_answer)] if _may_be_cut(cut_gold) and _may_be_cut(cut_answer) else []
    return [(gold_tokens, cut_answer)] if _is_cut(cut_answer) else []


def _may_be_cut(tokens: list[Token]) -> bool:
    return _is_cut(tokens) or any(a.value == "," and b.space for a, b in itertools.pairwise(tokens))


def _is_cut(tokens: list[Token]) -> bool:
    """Whether commas cut a list beyond doubt: inside of brackets, or many of them behind three digits."""
    num_commas = sum(token.value == "," for token in tokens)
    first = next((token.value for token in tokens if token.number is not None), "")
    return any(token.value in ("(", "[", "lbrace") for token in tokens) or (num_commas >= 2 and len(first) == 3)


def _same_tokens(gold: list[Token], answer: list[Token]) -> bool:
    try:
        wanted, given = grammar.parse(list(gold)), grammar.parse(list(answer))
    except (ValueError, RecursionError):
        return False
    try:
        if _is_bare_sum(given) and not isinstance(wanted, (Sum, Words)):
            return False
        return _same(wanted, given)
    except (ValueError, ArithmeticError, OverflowError, RecursionError, TypeError):
        return False


def _is_bare_sum(node: Node) -> bool:
    """3 + 5 is the question, not its answer."""
    return isinstance(node, Sum) and all(
        isinstance(term, Num) or (isinstance(term, Product) and all(isinstance(f, Num) for f in term.factors))
        for term in node.terms
    )


# -- answers ---------------------------------------------------------------------------------------------------


def _same(gold: Node, answer: Node) -> bool:
    by_region = _as_regions(gold, answer)
    if by_region is not None:
        return by_region
    gold_items, answer_items = _items(gold), _items(answer)
    if isinstance(gold, Group) and len(answer_items) == len(gold.items) > 1:
        answer = _by_name(answer_items) or answer  # x = 1, y = 2 is the point (1, 2)
        answer_items = _items(answer)
    if len(gold_items) != len(answer_items) or len(gold_items) > _MAX_ITEMS:
        return False
    if len(gold_items) == 1:
        return _same_item(gold_items[0], answer_items[0])
    gold_names, answer_names = [_name(item) for item in gold_items], [_name(item) for item in answer_items]
    named = None not in gold_names + answer_names and len(set(gold_names)) == len(gold_names)
    if named and len(set(answer_names)) == len(answer_names):
        order = dict(zip(answer_names, answer_items, strict=True))
        return set(gold_names) == set(answer_names) and all(
            _same_item(item, order[name]) for name, item in zip(gold_names, gold_items, strict=True)
        )
    return _match(gold_items, answer_items)


def _all_same(first: tuple[Node, ...], second: tuple[Node, ...]) -> bool:
    return all_same(first, second, _same)


def _match(gold: list[Node], answer: list[Node]) -> bool:
    """Every item has its partner; equality is transitive, so the first partner found is as good as any."""
    left = list(answer)
    for item in gold:
        partner = next((index for index, other in enumerate(left) if _same_item(item, other)), None)
        if partner is None:
            return False
        del left[partner]
    return True


def _items(node: Node) -> list[Node]:
    """Returns the items of a list, a set or a value with \\pm; of \\{0\\} and of 0 the same."""
    match node:
        case Many(items, _):
            found = [inner for item in items for inner in _items(item)]
            return found if found else [Many(())]
        case Chain((Sym(), Many() as inner), ("in",)) | Chain((Sym(), Many() as inner), ("=",)):
            return _items(inner)
        case Chain((name, value), ("=",)) if len(variants(value)) > 1:
            return [Chain((name, variant), ("=",)) for variant in variants(value)]
        case Group("(", (Many() as inner,), ")"):
            return _items(inner)
        case Sum() | Product() | Measured() | Call() | Power() | Choice():
            return _distinct(variants(node))
    return [node]


def _distinct(nodes: list[Node]) -> list[Node]:
    return nodes[:1] if len(nodes) == 2 and equal(nodes[0], nodes[1]) else nodes


def _name(node: Node) -> str | None:
    return (
        node.sides[0].name
        if isinstance(node, Chain) and node.relations == ("=",) and isinstance(node.sides[0], Sym)
        else None
    )


def _by_name(items: list[Node]) -> Node | None:
    """Returns the tuple of the values of x = 1, y = 2, by name; None where one is missing or double."""
    names = [_name(item) for item in items]
    if None in names or len(set(names)) < len(names):
        return None
    in_order = sorted(zip(names, items, strict=True), key=lambda pair: str(pair[0]))
    return Group("(", tuple(item.sides[1] for _, item in in_order if isinstance(item, Chain)), ")")


def _as_regions(gold: Node, answer: Node) -> bool | None:
    """Returns the verdict where both are sets of reals and at least one says so beyond doubt, else None."""
    first, second = _strip_names(gold), _strip_names(answer)
    certain = [_is_region(node) for node in (first, second)]
    if not any(certain):
        return None
    regions = region_of(first), region_of(second)
    if regions[0] is None or regions[1] is None:
        return same_inequality(gold, answer, _same)
    variables = variable_of(first), variable_of(second)
    if None not in variables and variables[0] != variables[1]:
        return False
    return same_region(regions[0], regions[1])


def _strip_names(node: Node) -> Node:
    match node:
        case Chain((Sym(), inner), ("in",)):
            return inner
    return node


def _is_region(node: Node) -> bool:
    match node:
        case Chain(_, relations):
            return any(relation in ("<", "<=", ">", ">=", "!=", "in") for relation in relations)
        case Many(items, _) if items:
            return all(_is_region(item) for item in items)
        case Group(left, (_, _), right):
            return (left, right) in (("(", "]"), ("[", ")"), ("]", "["), ("]", "]"), ("[", "["))
        case Sym("bbR"):
            return True
        case SetOf():
            return True
    return False


# -- one item ---------------------------------------------------------------------------------------------------


def _same_item(gold: Node, answer: Node) -> bool:
    if gold == answer:
        return not isinstance(gold, Chain) or not contradicts(gold, _same)
    if isinstance(gold, Chain) or isinstance(answer, Chain):
        return same_chain(gold, answer, _same)
    # units must agree where both have one; a letter is a unit only where the gold has no variable
    gold, gold_unit = _without_unit(gold)
    answer, answer_unit = _without_unit(answer)
    if "permil" in (gold_unit, answer_unit) and gold_unit != answer_unit:
        return False
    if gold_unit and answer_unit and gold_unit != answer_unit and not _same_count(gold_unit, answer_unit):
        return False
    if not gold_unit and not answer_unit and not variables(gold):
        answer = _without_letter_unit(answer)
    answer = _with_constant(gold, answer)
    # two of one kind, piece by piece; what is left are values
    match gold, answer:
        case (Words(a), Words(b)):
            return a == b
        case Based(digits, base), Based(others, other_base):
            return digits.lstrip("0") == others.lstrip("0") and base == other_base
        case Group(left, items, right), Group(other_left, others, other_right):
            brackets = (left, right) == (other_left, other_right) or len(items) != 2
            return brackets and _all_same(items, others)
        case Matrix(rows), Matrix(others):
            return len(rows) == len(others) and all(_all_same(a, b) for a, b in zip(rows, others, strict=True))
        case Matrix(rows), Group("(", items, ")"):
            return _all_same(tuple(item for row in rows for item in row), items) and (
                len(rows) == 1 or all(len(r) == 1 for r in rows)
            )
        case Group("(", items, ")"), Matrix(rows):
            return _same_item(answer, gold) if items else False
        case Ratio(parts), Ratio(others):
            return len(parts) == len(others) and _proportional(parts, others)
        case Many((), _), Many((), _):
            return True
    return _same_value(gold, gold_unit, answer, answer_unit)


def _with_constant(gold: Node, answer: Node) -> Node:
    """The constant of integration may be called c or K."""
    missing, extra = variables(gold) - variables(answer), variables(answer) - variables(gold)
    if missing == {"C"} and len(extra) == 1 and extra <= {"c", "K", "k", "C_1", "c_1"}:
        return renamed(answer, extra.pop(), "C")
    return answer


def _same_value(gold: Node, gold_unit: str, answer: Node, answer_unit: str) -> bool:
    """Equal numbers; where only one has a percent sign it may also stand for the hundredth."""
    if any(isinstance(node, (Words, Group, Many, Matrix, Ratio, Based, SetOf)) for node in (gold, answer)):
        return False
    if equal(gold, answer):
        return True
    hundredth = Num(Fraction(1, 100))
    if gold_unit == "percent" and not answer_unit:
        return equal(Product((gold, hundredth)), answer)
    if answer_unit == "percent" and not gold_unit:
        return equal(gold, Product((answer, hundredth)))
    return _same_to_base_ten(gold, answer)


def _same_to_base_ten(gold: Node, answer: Node) -> bool:
    """\\log without a base is the natural one or that to 10, on both sides the same."""
    if not any("log" in _functions(node) for node in (gold, answer)):
        return False
    return equal(_to_base_ten(gold), _to_base_ten(answer))


def _functions(node: Node) -> set[str]:
    own = {node.name} if isinstance(node, Call) else set()
    return own.union(*(_functions(child) for child in children(node)))


def _to_base_ten(node: Node) -> Node:
    node = rebuilt(node, _to_base_ten)
    return (
        Call("log_base", (Num(Fraction(10)), *node.arguments))
        if isinstance(node, Call) and node.name == "log"
        else node
    )


def _without_unit(node: Node) -> tuple[Node, str]:
    unit = ""
    while isinstance(node, Measured):
        unit = unit or node.unit
        node = node.value
    last = node.factors[-1] if isinstance(node, Product) else node
    if isinstance(node, Product) and isinstance(last, Measured) and len(node.factors) > 1:
        return Product((*node.factors[:-1], last.value)), unit or last.unit
    if isinstance(node, Product) and len(node.factors) == 2 and node.factors[0] == MINUS_ONE:
        inner, unit = _without_unit(node.factors[1])
        return negated(inner), unit
    return node, unit


def _same_count(first: str, second: str) -> bool:
    """Two nouns that are counted, neither of them a measure: "values" and "solutions" name the same 9."""
    return (
        not is_measure(first)
        and not is_measure(second)
        and "percent" not in (first, second)
        and "permil" not in (first, second)
    )


def _without_letter_unit(node: Node) -> Node:
    """5 m, 5 m^2 and 5 m/s where the gold answer knows no letters."""
    if isinstance(node, Product) and isinstance(node.factors[0], Num) and all(map(_is_letter_unit, node.factors[1:])):
        return node.factors[0]
    return node


def _is_letter_unit(node: Node) -> bool:
    base = node.base if isinstance(node, Power) and isinstance(node.exponent, Num) else node
    return isinstance(base, Sym) and base.name in SINGLE_LETTER_UNITS


def _proportional(first: tuple[Node, ...], second: tuple[Node, ...]) -> bool:
    if _all_same(first, second):
        return True
    try:
        ratios = [number_of(Product((a, Power(b, MINUS_ONE)))) for a, b in zip(first, second, strict=True)]
    except ValueError:
        return False
    return not _is_time(first) and not _is_time(second) and all(close(ratio, ratios[0], 30) for ratio in ratios)


def _is_time(parts: tuple[Node, ...]) -> bool:
    """12:00 is a time of the day: a ratio has no part of 0."""
    return any(isinstance(part, Num) and part.value == 0 for part in parts)

"""The atoms of the grammar: numbers, names, brackets, roots, fractions, functions, matrices.

    atom     = number | name | ( ... ) | [ ... ] | { ... } | | ... | | command arguments | function argument

Brackets hold answers and arguments hold sums: the subclasses have those rules.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable
from fractions import Fraction

from aer_megatron.rewards.answers.cursor import Cursor
from aer_megatron.rewards.answers.nodes import (
    MINUS_ONE,
    Based,
    Call,
    Chain,
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
    Sym,
)
from aer_megatron.rewards.answers.spelling import Token, spelled
from aer_megatron.rewards.answers.words import FUNCTIONS, GREEK

CLOSING = {"(": ")", "[": "]", "{": "}", "lbrace": "rbrace", "lfloor": "rfloor", "lceil": "rceil", "langle": "rangle"}
_ENVIRONMENTS = frozenset(("pmatrix", "bmatrix", "matrix", "vmatrix", "smallmatrix", "array", "Bmatrix"))


class Atoms(Cursor):
    """Recursive descent over what stands for itself."""

    def __init__(self, tokens: list[Token]) -> None:
        super().__init__(tokens)
        self.bars = 0  # how many | are open

    @abstractmethod
    def answer(self) -> Node:
        """Returns what brackets hold."""

    @abstractmethod
    def chain(self) -> Node:
        """Returns an entry of a matrix."""

    @abstractmethod
    def inner(self, tokens: list[Token]) -> Node:
        """Returns the tree of other tokens: the base of a logarithm."""

    @abstractmethod
    def sum_(self) -> Node:
        """Returns a sum."""

    @abstractmethod
    def factor(self) -> Node:
        """Returns an atom with its powers and indices."""

    @abstractmethod
    def signed_factor(self) -> Node:
        """Returns a factor behind a sign."""

    @abstractmethod
    def argument(self) -> Node:
        """Returns a group or one character."""

    @abstractmethod
    def raw_argument(self) -> list[Token]:
        """Returns the tokens of a group, or one."""

    @abstractmethod
    def starts_factor(self) -> bool:
        """Returns whether the next token can go on with a product."""

    @abstractmethod
    def refuse_glued(self, factors: list[Node]) -> None:
        """Raises ValueError where two numbers would follow one another."""

    def atom(self) -> Node:
        token = self.take()
        if token.number is not None:
            return self._number(token)
        if token.kind == "name":
            return Sym(token.value)
        if token.kind == "word":
            raise ValueError(f"the word {token.value!r} stands inside of an expression")
        if token.value in ("(", "[", "]", "lbrace", "{", "langle"):
            return self._bracketed(token.value)
        if token.value == "|":
            return self._absolute()
        if token.value in ("lfloor", "lceil"):
            inner = self.deeper(self.sum_)
            self.skip(CLOSING[token.value])
            return Call(token.value[1:], (inner,))
        if token.value in FUNCTIONS:
            return self._function(token.value)
        if token.value in ATOMS:
            return ATOMS[token.value](self)
        if token.value.startswith("begin:"):
            return self._environment(token.value[6:])
        if token.value in ("angle", "triangle"):
            return self._figure(token.value)
        if token.value in ("dollar", "permil"):
            return Measured(self.factor(), token.value)
        if token.value in GREEK:
            return Many(()) if token.value == "emptyset" else Sym(token.value)
        raise ValueError(f"{token.value!r} is not known here")

    def _number(self, token: Token) -> Node:
        """A number, also with repeating decimals behind it, and 2A_{16}."""
        if self.at_mark("overline", "dot") and "." in token.value:
            return self._repeating(token.value)
        if token.number is None:
            raise ValueError("not a number")
        letters = list(
            itertools.takewhile(lambda t: t.kind in ("name", "number") and not t.space, self.tokens[self.at :])
        )
        if (
            letters
            and self.at_mark("_", ahead=len(letters))
            and any(t.number is not None or t.value in "ABCDEF" for t in letters)
        ):
            after = self.peek(len(letters) + 1)
            if after is not None and after.value != "n":
                digits = token.value + "".join(t.value for t in letters)
                self.at += len(letters) + 1
                return Based(digits.upper(), base_of(self.raw_argument()))
        return Num(token.number)

    def _repeating(self, digits: str) -> Node:
        if self.at_mark("overline"):
            self.at += 1
            cycle = _digits(self.raw_argument())
        else:  # 0.\dot{1}4285\dot{7}
            self.at += 1
            cycle = _digits(self.raw_argument())
            rest = self.peek()
            if rest is not None and rest.number is not None and self.at_mark("dot", ahead=1):
                self.at += 2
                cycle += rest.value + _digits(self.raw_argument())
            elif self.at_mark("dot"):
                self.at += 1
                cycle += _digits(self.raw_argument())
        whole, _, decimals = digits.partition(".")
        fixed = Fraction(int((whole or "0") + decimals), 10 ** len(decimals))
        return Num(fixed + Fraction(int(cycle), 10 ** len(decimals) * (10 ** len(cycle) - 1)))

    def _bracketed(self, left: str) -> Node:
        closing = {"]": "["}.get(left) or CLOSING[left]
        if left == "{":
            node = self.deeper(self.answer)
            self.skip("}")
            return node
        if self.at_mark(closing):
            self.at += 1
            return Many(()) if left == "lbrace" else Group(left, (), closing)
        bars, self.bars = self.bars, 0
        node = self.deeper(self.answer)
        self.bars = bars
        if left == "lbrace":
            return self._braced(node)
        right = self.take().value
        if right not in (")", "]", "[", "rangle"):
            raise ValueError(f"{left!r} is closed by {right!r}")
        if isinstance(node, Many) and node.joined_by == "," and len(node.items) > 1:
            return Group("(" if left == "langle" else left, node.items, ")" if right == "rangle" else right)
        if (left, right) in (("(", ")"), ("[", "]")):
            return Group(left, (node,), right) if isinstance(node, Many) else node
        raise ValueError("brackets do not match")

    def _braced(self, node: Node) -> Node:
        """\\{a, b\\}, or \\{x | condition\\}."""
        if self.at_mark("|", "mid"):
            self.at += 1
            node = self.deeper(self.answer)
            self.skip("rbrace")
            return node
        self.skip("rbrace")
        match node:
            case Chain((Ratio((Sym(), first)), *others), relations):
                return Chain((first, *others), relations)
            case Many(items, _):
                return Many(items)
            case SetOf() | Chain() | Ratio():
                return node
        return Many((node,))

    def _absolute(self) -> Node:
        self.bars += 1
        inner = self.deeper(self.sum_)
        self.bars -= 1
        self.skip("|")
        return Call("abs", (inner,))

    def _figure(self, name: str) -> Node:
        letters = []
        while (token := self.peek()) is not None and token.kind in ("name", "word"):
            letters.append(self.take().value)
        return Sym(name + "".join(letters))

    def _environment(self, name: str) -> Node:
        if name not in _ENVIRONMENTS:
            raise ValueError(f"environment {name!r} is not known")
        rows: list[tuple[Node, ...]] = []
        row: list[Node] = []
        while not self.at_mark(f"end:{name}"):
            if self.at_mark("newrow"):
                self.at += 1
                rows.append(tuple(row))
                row = []
            elif self.at_mark("&") or self.at_mark("hline"):
                self.at += 1
            else:
                row.append(self.deeper(self.chain))
        self.at += 1
        rows.extend([tuple(row)] if row else [])
        return Matrix(tuple(rows))

    def _function(self, name: str) -> Node:
        power: Node | None = None
        base: list[Token] | None = None
        while self.at_mark("^", "_"):
            if self.take().value == "^":
                power = self.argument()
            else:
                base = self.raw_argument()
        arguments = self._arguments_of(name)
        if name in ("log", "lg", "ln") and base is not None:
            node: Node = Call("log_base", (self.inner(base), *arguments))
        elif base is not None:
            raise ValueError(f"{name} has no index")
        else:
            node = Call(name, arguments)
        if power == MINUS_ONE:
            inverse = "arc" + name
            if inverse not in FUNCTIONS:
                raise ValueError(f"{name}^-1 is not known")
            return Call(inverse, arguments)
        return Power(node, power) if power is not None else node

    def _arguments_of(self, name: str) -> tuple[Node, ...]:
        """(...) where it follows at once, else the product up to the next sign, function or explicit multiplication."""
        if self.at_mark("(", "[", "{", "lbrace"):
            node = self.factor() if not self.at_mark("{") else self.deeper(self.atom)
            if isinstance(node, (Group, Many)):
                return node.items
            return (node,)
        factors = [self.signed_factor()]
        while self.starts_factor() and not self._begins_function():
            self.refuse_glued(factors)
            factors.append(self.factor())
        if self.at_mark("/") and name not in ("gcd", "lcm"):  # \ln 3/2 and \sin x/2: the quotient is the argument
            token = self.peek(1)
            if token is not None and token.number is not None and isinstance(factors[-1], Num):
                self.at += 1
                factors.append(Power(self.factor(), MINUS_ONE))
        return (product_of(factors),)

    def _begins_function(self) -> bool:
        token = self.peek()
        return token is not None and (token.value in FUNCTIONS or token.value == "|")

    def _fraction(self) -> Node:
        above, below = self.argument(), self.argument()
        return Product((above, Power(below, MINUS_ONE)))

    def _root(self) -> Node:
        degree: Node = Num(Fraction(2))
        if self.at_mark("["):
            self.at += 1
            degree = self.deeper(self.sum_)
            self.skip("]")
        # \sqrt 12 is the root of 12 as people mean it
        token = self.peek()
        if token is not None and token.number is not None:
            self.at += 1
            return Call("root", (Num(token.number), degree))
        return Call("root", (self.argument(), degree))

    def _binomial(self) -> Node:
        return Call("binom", (self.argument(), self.argument()))

    def _decorated(self, name: str) -> Node:
        inner = self.raw_argument()
        return Sym(f"{name}{spelled(inner)}")


def product_of(factors: list[Node]) -> Node:
    return factors[0] if len(factors) == 1 else Product(tuple(factors))


def _digits(tokens: list[Token]) -> str:
    if len(tokens) != 1 or tokens[0].number is None or not tokens[0].value.isdigit():
        raise ValueError("repeating decimals are digits")
    return tokens[0].value


_BASE_WORDS = {
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}


def base_of(tokens: list[Token]) -> str:
    text = spelled(tokens).strip("()")
    return _BASE_WORDS.get(text, text)


ATOMS: dict[str, Callable[[Atoms], Node]] = {
    "frac": Atoms._fraction,
    "sqrt": Atoms._root,
    "binom": Atoms._binomial,
    "overline": lambda parser: parser._decorated("overline"),
    "vec": lambda parser: parser._decorated("vec"),
    "hat": lambda parser: parser._decorated("hat"),
    "tilde": lambda parser: parser._decorated("tilde"),
    "widehat": lambda parser: parser._decorated("hat"),
    "dot": lambda parser: parser._decorated("dot"),
}

"""The arithmetic of the grammar: sums, products, factors.

sum      = [sign] product { sign product }            sign: + - pm mp
product  = factor { [* / div] factor }                a fraction behind an integer makes a mixed number
factor   = atom { ^ argument | _ argument | ! | ' | degree | percent }
"""

from __future__ import annotations

from fractions import Fraction

from aer_megatron.rewards.answers.atoms import ATOMS, CLOSING, Atoms, base_of, product_of
from aer_megatron.rewards.answers.nodes import (
    MINUS_ONE,
    Based,
    Call,
    Choice,
    Measured,
    Node,
    Num,
    Power,
    Product,
    Sum,
    Sym,
)
from aer_megatron.rewards.answers.spelling import Token, spelled
from aer_megatron.rewards.answers.words import FUNCTIONS, GREEK


class Expressions(Atoms):
    """Recursive descent over arithmetic."""

    def sum_(self) -> Node:
        terms = [self._signed()]
        while self.at_mark("+", "-", "pm", "mp"):
            terms.append(self._signed())
        return Sum(tuple(terms)) if len(terms) > 1 else terms[0]

    def _signed(self) -> Node:
        if self.at_mark("+"):
            self.at += 1
        elif self.at_mark("-"):
            self.at += 1
            inner = self.deeper(self._signed)
            return Num(-inner.value) if isinstance(inner, Num) else Product((MINUS_ONE, inner))
        elif self.at_mark("pm", "mp"):
            sign = 1 if self.take().value == "pm" else -1
            return Choice(sign, self.deeper(self._signed))
        return self._product()

    def _product(self) -> Node:
        factors = [self.factor()]
        while True:
            if self.at_mark("cdot"):
                self.at += 1
                factors.append(self.signed_factor())
            elif self.at_mark("/", "div"):
                if self._mixed(factors, ahead=0):
                    continue
                self.at += 1
                factors.append(Power(self.signed_factor(), MINUS_ONE))
            elif self.at_mark("choose"):
                self.at += 1
                factors = [Call("binom", (product_of(factors), self._product()))]
            elif self.starts_factor():
                if not self._mixed(factors, ahead=0):
                    self.refuse_glued(factors)
                    factors.append(self.factor())
            else:
                return product_of(factors)

    def signed_factor(self) -> Node:
        if self.at_mark("-", "+"):
            sign = self.take().value
            inner = self.deeper(self.signed_factor)
            return Product((MINUS_ONE, inner)) if sign == "-" else inner
        return self.factor()

    def refuse_glued(self, factors: list[Node]) -> None:
        token = self.peek()
        if token is not None and token.number is not None and isinstance(factors[-1], Num):
            raise ValueError("two numbers with nothing between them")

    def _mixed(self, factors: list[Node], ahead: int) -> bool:
        """Joins ``2 1/2`` and ``2\\frac{1}{2}`` to the number behind an integer; the next token begins the fraction."""
        whole, before = factors[-1], self.tokens[self.at - 1]
        if len(factors) > 1 or not isinstance(whole, Num) or whole.value.denominator != 1 or before.number is None:
            return False
        token = self.peek(ahead)
        if token is None:
            return False
        start = self.at
        if self.at_mark("frac"):
            fraction = self.factor()
            match fraction:
                case Product((Num(up), Power(Num(down), Num(power)))) if power == -1 and 0 < up < down:
                    factors[-1] = Num(whole.value + up / down)
                    return True
        elif token.number is not None and token.space and self.at_mark("/", ahead=1):
            below = self.peek(2)
            if below is not None and below.number and token.number < below.number:
                self.at += 3
                factors[-1] = Num(whole.value + token.number / below.number)
                return True
        self.at = start
        return False

    def starts_factor(self) -> bool:
        token = self.peek()
        if token is None or token.kind == "word":
            return False
        if token.kind in ("number", "name"):
            return True
        if token.value == "|":
            return self.bars == 0
        if token.value == "[":  # ]2, 3[ is an interval: this bracket closes where nothing follows that it could hold
            after = self.peek(1)
            return after is not None and after.value not in (
                "cup",
                "cap",
                "setminus",
                ",",
                ")",
                "]",
                "}",
                "rbrace",
                ";",
            )
        if token.kind == "mark":
            return token.value in ("(", "{")
        return token.value in GREEK or token.value in FUNCTIONS or token.value in ATOMS or token.value in CLOSING

    def factor(self) -> Node:
        node = self.deeper(self.atom)
        while True:
            if self.at_mark("^"):
                node = self._raised(node)
            elif self.at_mark("_"):
                self.at += 1
                node = self._indexed(node)
            elif self.at_mark("!"):
                self.at += 1
                node = Call("factorial", (node,))
            elif self.at_mark("'"):
                self.at += 1
                if not isinstance(node, Sym):
                    raise ValueError("a prime behind no name")
                node = Sym(node.name + "'")
            elif self.at_mark("circ", "percent", "permil", "dollar"):
                if isinstance(node, Measured):
                    raise ValueError("two units, one behind the other")
                unit = self.take().value
                node = Measured(node, "degree" if unit == "circ" else unit)
            else:
                return node

    def _raised(self, node: Node) -> Node:
        self.at += 1
        if self.at_mark("circ"):
            self.at += 1
            return Measured(node, "degree")
        if self.at_mark("{") and self.at_mark("circ", ahead=1) and self.at_mark("}", ahead=2):
            self.at += 3
            return Measured(node, "degree")
        if self.at_mark("'", "prime") and isinstance(node, Sym):
            self.at += 1
            return Sym(node.name + "'")
        return Power(node, self.argument())

    def _indexed(self, node: Node) -> Node:
        index = self.raw_argument()
        match node:
            case Num(value) if value.denominator == 1 and value >= 0:
                return Based(str(value.numerator), base_of(index))
            case Sym("C") if self.at_mark("^") and len(index) == 1 and index[0].number is not None:
                self.at += 1
                return Call("binom", (Num(index[0].number), self.argument()))  # C_{10}^{3}
            case Sym(name):
                return Sym(f"{name}_{spelled(index)}")
        raise ValueError("an index behind no name")

    def raw_argument(self) -> list[Token]:
        """Returns the tokens of a script: a group's, or one."""
        if not self.at_mark("{"):
            return [self.take()]
        depth, start = 0, self.at + 1
        while True:
            token = self.take()
            if token.kind == "mark" and token.value == "{":
                depth += 1
            elif token.kind == "mark" and token.value == "}":
                depth -= 1
                if depth == 0:
                    return self.tokens[start : self.at - 1]

    def argument(self) -> Node:
        """One group or, as LaTeX reads it, one character: \\frac12 is a half."""
        if self.at_mark("{"):
            self.at += 1
            node = self.deeper(self.sum_)
            self.skip("}")
            return node
        if self.at_mark("-", "+"):
            return self.signed_factor()
        token = self.take()
        if token.number is not None:
            first, rest = token.value[:1], token.value[1:]
            if rest and "." not in token.value:
                self.at -= 1
                self.tokens[self.at] = Token("number", rest, Fraction(int(rest)))
                return Num(Fraction(int(first)))
            return Num(token.number)
        self.at -= 1
        return self.deeper(self.atom)

"""The grammar of answers: tokens into trees.

    answer   = item { ("," | ";" | "and" | "or") item }
    item     = [lead words] chain [unit | prose]
    chain    = sets { relation sets }                     relation: = < > <= >= != in
    sets     = ratio { (cup | cap | setminus) ratio }
    ratio    = sum { ":" sum }
    sum      = arithmetic (expressions.py)

An item of words is ``Words``. What the grammar does not know is a ``ValueError``: such answers are compared as texts.
This file does NOT compare.
"""

from __future__ import annotations

from aer_megatron.rewards.answers.cursor import trimmed
from aer_megatron.rewards.answers.expressions import Expressions
from aer_megatron.rewards.answers.nodes import Chain, Many, Measured, Node, Num, Ratio, SetOf, Sym, Words
from aer_megatron.rewards.answers.spelling import Token, spelled
from aer_megatron.rewards.answers.words import ARTICLES, HEDGES, LEADS, POWERS, SINGLE_LETTER_UNITS, is_measure, unit_of

_RELATIONS = {
    "=": "=",
    "<": "<",
    ">": ">",
    "le": "<=",
    "ge": ">=",
    "ne": "!=",
    "in": "in",
    "approx": "=",
    "equiv": "equiv",
}


_NAMED: dict[str, Node] = {
    "infinity": Sym("infty"),
    "emptyset": Many(()),
    "noelements": Many(()),
    "allrealnumbers": Sym("bbR"),
    "allreals": Sym("bbR"),
    "realnumbers": Sym("bbR"),
}


def parse(tokens: list[Token]) -> Node:
    """Returns the tree of an answer. Raises ValueError where it is no sentence of the grammar."""
    parser = _Parser(trimmed(tokens))
    node = parser.answer()
    parser.expect_end()
    return node


def text_of(tokens: list[Token]) -> str:
    """Returns the text that tokens spell, for answers that are words: no case, blanks, articles or final period."""
    tokens = trimmed(tokens)
    words = [token for token in tokens if token.kind == "word"]
    if words and tokens[0].kind == "word" and tokens[0].value.casefold() in ARTICLES and len(tokens) > 1:
        tokens = tokens[1:]
    return spelled([token for token in tokens if token.value != "circ"]).casefold().replace("\\", "").replace(" ", "")


class _Parser(Expressions):
    """Lists, items, relations and sets."""

    def inner(self, tokens: list[Token]) -> Node:
        return parse(tokens)

    def answer(self) -> Node:
        items = [self._item()]
        joined_by = ","
        while True:
            word = self._joint()
            if word is None:
                break
            joined_by = word if word != "," else joined_by
            if self.peek() is None or self._closes():
                break
            items.append(self._item())
        return items[0] if len(items) == 1 else Many(tuple(items), joined_by)

    def _joint(self) -> str | None:
        """Takes what joins two items: ", and" and "or" count once. Returns what it was, or None."""
        joint = None
        while True:
            token = self.peek()
            if self.at_mark(",", ";", "newrow"):
                joint = joint or ","
            elif token is not None and token.kind == "word" and token.value.casefold() in ("and", "or", "或", "和"):
                joint = "or" if token.value.casefold() in ("or", "或") else "and"
            elif self.at_mark("vee", "wedge"):
                joint = "or" if self.at_mark("vee") else "and"
            else:
                return joint
            self.at += 1

    def _closes(self) -> bool:
        return self.at_mark(")", "]", "}", "rbrace", "rangle")

    def _item(self) -> Node:
        start = self.at
        self._lead()
        token = self.peek()
        if token is not None and token.kind == "word":
            return self._only_words(start)
        node = self.deeper(self.chain)
        return self._with_unit(node)

    def _only_words(self, start: int) -> Node:
        while self.peek() is not None and not self.at_mark(",", ";", ")", "]", "}", "rbrace"):
            token = self.take()
            if token.kind == "word" and token.value.casefold() in ("and", "or") and self.at - 1 > start:
                self.at -= 1
                break
        text = text_of(self.tokens[start : self.at])
        return _NAMED.get(text, Words(text))

    def _lead(self) -> None:
        """Passes over "the answer is" and the like; a word that changes the value is no lead."""
        at, words = self.at, []
        while at < len(self.tokens) and self.tokens[at].kind == "word":
            words.append(self.tokens[at].value.casefold())
            at += 1
        ends_in_mark = at < len(self.tokens) and self.tokens[at].value in (":", "=")
        if not words or at == len(self.tokens) or any(word in HEDGES - {"to", "of"} for word in words):
            return
        if ends_in_mark or words[-1] in LEADS:
            self.at = at + ends_in_mark
        elif (
            len(words) == 1
            and is_measure(unit_of(self.tokens[at - 1].value))
            and words[0] in ("dollar", "euro", "pound")
        ):
            self.at = at

    def _with_unit(self, node: Node) -> Node:
        """Takes words behind a value: a unit, or a noun and what is said of it; "or more" is neither."""
        token = self.peek()
        if token is None or token.kind != "word" or token.value.casefold() in ("and", "or", "或", "和"):
            return node
        units: list[str] = []
        power, per = 1, False
        while (token := self.peek()) is not None:
            word = token.value.casefold()
            after = self.peek(1)
            if word == "for" and after is not None and after.value.casefold() in ("all", "any", "every", "each"):
                self.at = len(self.tokens)  # "for all x" takes nothing back
            elif token.kind == "word" or (per and token.value in SINGLE_LETTER_UNITS):
                if word in ("or", "and"):
                    break
                if word in HEDGES:
                    raise ValueError(f"{token.value!r} behind a value changes it")
                self.at += 1
                power = max(power, POWERS.get(word, 1))
                if word in POWERS or word in ARTICLES:
                    continue
                if word == "per":
                    per = True
                else:
                    units.append(("/" if per else "") + unit_of(token.value))
                    per = False
            elif self.at_mark("^"):
                self.at += 1
                exponent = self.argument()
                if not isinstance(exponent, Num) or not units:
                    raise ValueError("a unit's power is a number")
                if exponent.value != 1:
                    units[-1] += f"^{exponent.value}"
            elif self.at_mark("/") and units:
                self.at += 1
                per = True
            elif self.at_mark("(", "."):  # "(approximately)", "sq. ft."
                if self.at_mark("("):
                    raise ValueError("a remark behind the value")
                self.at += 1
            else:
                break
        return Measured(node, _unit_name(units, power)) if units else node

    def chain(self) -> Node:
        sides, relations = [self._sets()], []
        while (token := self.peek()) is not None and token.kind in ("mark", "command") and token.value in _RELATIONS:
            self.at += 1
            relation = _RELATIONS[token.value]
            if relation in ("<", ">") and self.at_mark("="):
                self.at += 1
                relation += "="
            relations.append(relation)
            sides.append(self._sets())
        return Chain(tuple(sides), tuple(relations)) if relations else sides[0]

    def _sets(self) -> Node:
        node = self._ratio()
        while self.at_mark("cup", "cap", "setminus"):
            operator = self.take().value
            node = SetOf(operator, (node, self._ratio()))
        return node

    def _ratio(self) -> Node:
        parts = [self.sum_()]
        while self.at_mark(":"):
            self.at += 1
            parts.append(self.sum_())
        return Ratio(tuple(parts)) if len(parts) > 1 else parts[0]


def _unit_name(units: list[str], power: int) -> str:
    """Returns ``in^2`` for "square inches", ``mi/h`` for "miles per hour"; of several nouns the last one counts."""
    measures = [unit for unit in units if is_measure(unit.lstrip("/"))]
    if not measures:
        return units[-1].lstrip("/")
    if power > 1 and "^" not in measures[0]:
        measures[0] += f"^{power}"
    return {"mi/h": "mph", "km/h": "kph"}.get("".join(measures), "".join(measures))

"""Are two expressions equal? Constants exactly where they are rational, else to many digits; formulas at random points.

    rational        Fractions: 10^100 is not 10^100 + 1
    other constants 60 digits, and again 150: a difference that shrinks with the precision is none
    with variables  at points that depend on the names only; a point counts where both sides have a value

Sizes are bounded before anything is computed: a power or a factorial beyond the bounds has no value here (ValueError).
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import mpmath

from aer_megatron.rewards.answers.nodes import (
    Call,
    Choice,
    Measured,
    Node,
    Num,
    Power,
    Product,
    Sum,
    Sym,
    children,
    rebuilt,
    variables,
)

Value = Any  # Fraction, mpmath.mpf or mpmath.mpc

_MAX_BITS = 200_000
_MAX_FACTORIAL = 5_000
_NUM_POINTS = 5
_OF_ANGLES = frozenset(("sin", "cos", "tan", "cot", "sec", "csc"))
_POINT_DIGITS = 40
_DIGITS, _MORE_DIGITS = 60, 150


def equal(a: Node, b: Node) -> bool:
    """Returns whether two expressions are equal wherever both have a value; False where none can be computed."""
    names = sorted(variables(a) | variables(b))
    try:
        return _equal_formulas(a, b, names) if names else _equal_constants(a, b)
    except (ValueError, ArithmeticError, OverflowError, RecursionError, TypeError, MemoryError):
        return False


def number_of(node: Node, digits: int = _DIGITS) -> Value:
    """Returns the value of a constant. Raises ValueError where it has variables or no value."""
    with mpmath.workdps(digits):
        return _evaluate(node, {})


def is_infinite(value: Value) -> bool:
    """Returns whether a value is plus or minus infinity."""
    return not isinstance(value, Fraction) and bool(mpmath.isinf(value))


def close(a: Value, b: Value, digits: int) -> bool:
    """Returns whether two values agree to ``digits`` digits, relative to the larger one."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    if is_infinite(a) or is_infinite(b):
        return bool(_float(a) == _float(b))
    with mpmath.workdps(digits + 15):  # a fraction becomes a float here
        a, b = _float(a), _float(b)
        if mpmath.isnan(a) or mpmath.isnan(b):
            return False
        return bool(abs(a - b) <= max(abs(a), abs(b)) * mpmath.mpf(10) ** (-digits))


def evaluate_with(node: Node, env: Mapping[str, Value], digits: int) -> Value:
    """Returns the value of a formula where its variables have the values of ``env``. Raises ValueError without one."""
    with mpmath.workdps(digits):
        return _evaluate(node, env)


def values_at(node: Node, names: list[str], point: int) -> Value:
    """Returns the value of a formula at one of the points of its names. Raises ValueError where there is none."""
    with mpmath.workdps(_POINT_DIGITS):
        return _evaluate(node, _point(names, point))


def constant_ratio(a: Node, b: Node) -> Value | None:
    """Returns c where a = c b at every point with c the same number other than 0, else None."""
    names = sorted(variables(a) | variables(b))
    ratios = []
    for point in range(_NUM_POINTS):
        try:
            up, down = values_at(a, names, point), values_at(b, names, point)
        except (ValueError, ArithmeticError, OverflowError, TypeError):
            continue
        with mpmath.workdps(_POINT_DIGITS):
            if abs(_float(down)) < 1e-25 or abs(_float(up)) < 1e-25:
                return None
            ratios.append(_float(up) / _float(down))
    if len(ratios) < 2 or any(not close(ratio, ratios[0], 18) for ratio in ratios):
        return None
    return ratios[0]


def _equal_constants(a: Node, b: Node) -> bool:
    first = number_of(a), number_of(b)
    if all(isinstance(value, Fraction) for value in first):
        return bool(first[0] == first[1])
    if is_infinite(first[0]) or is_infinite(first[1]):
        return close(*first, 10)
    near = close(*first, _DIGITS - 15)  # 15 digits are what cancellation may cost
    if not near and 0 not in first:
        return False
    second = number_of(a, _MORE_DIGITS), number_of(b, _MORE_DIGITS)
    if near:
        return close(*second, _MORE_DIGITS - 15)
    with mpmath.workdps(_MORE_DIGITS):
        # a zero made of roundings gets smaller with every digit, a small number stays what it is
        sizes = [max(abs(_float(x)), abs(_float(y))) for x, y in (first, second)]
        return bool(sizes[1] <= sizes[0] * mpmath.mpf(10) ** (-(_MORE_DIGITS - _DIGITS) + 20))


def _equal_formulas(a: Node, b: Node, names: list[str]) -> bool:
    num_compared = 0
    for point in range(_NUM_POINTS + 3):
        both = []
        for node in (a, b):
            try:
                both.append(values_at(node, names, point))
            except (ValueError, ArithmeticError, OverflowError, TypeError):
                both.append(None)
        if both[0] is None and both[1] is None:
            continue
        # beyond the positive points branches of roots and logarithms differ: only where both are real do they count
        if point >= _NUM_POINTS and (both[0] is None or both[1] is None or not all(_is_real(value) for value in both)):
            continue
        if both[0] is None or both[1] is None or not _near(both[0], both[1]):
            return False
        num_compared += 1
    return num_compared >= 2


def _near(a: Value, b: Value) -> bool:
    return close(a, b, 18) or (abs(_float(a)) < 1e-20 and abs(_float(b)) < 1e-20)


def _is_real(value: Value) -> bool:
    return isinstance(value, Fraction) or mpmath.im(value) == 0 or abs(mpmath.im(value)) < 1e-20 * abs(value)


def _point(names: list[str], point: int) -> dict[str, Value]:
    """Positive numbers of no pattern first, then some negative ones; the same for the same names."""
    numbers = {}
    for name in names:
        rng = random.Random(zlib.crc32(f"{name}/{point}".encode()))
        value = Fraction(rng.randrange(300_000, 2_900_000), 1_000_003)
        numbers[name] = -value if point >= _NUM_POINTS and (rng.random() < 0.6 or len(names) == 1) else value
    return numbers


def _float(value: Value) -> Value:
    return mpmath.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


# -- evaluation -------------------------------------------------------------------------------------------------------


def _evaluate(node: Node, env: Mapping[str, Value]) -> Value:
    match node:
        case Num(value):
            return value
        case Sym(name):
            return _symbol(name, env)
        case Sum(terms):
            total: Value = Fraction(0)
            for term in terms:
                total = _add(total, _evaluate(term, env))
            return total
        case Product(factors):
            result: Value = Fraction(1)
            for factor in factors:
                result = _multiply(result, _evaluate(factor, env))
            return result
        case Power(base, exponent):
            return _power(_evaluate(base, env), _evaluate(exponent, env))
        case Call(name, arguments):
            if name in _OF_ANGLES:
                arguments = tuple(_in_radians(argument) for argument in arguments)
            return _call(name, [_evaluate(argument, env) for argument in arguments])
        case Measured(value, _):
            return _evaluate(value, env)
    raise ValueError(f"{type(node).__name__} is not a number")


def _in_radians(node: Node) -> Node:
    if isinstance(node, Measured) and node.unit == "degree":
        return Product((node.value, Sym("pi"), Num(Fraction(1, 180))))
    return rebuilt(node, _in_radians)


def _symbol(name: str, env: Mapping[str, Value]) -> Value:
    constants: dict[str, Callable[[], Value]] = {
        "pi": lambda: +mpmath.pi, "e": lambda: +mpmath.e, "i": lambda: mpmath.mpc(0, 1), "infty": lambda: mpmath.inf,
    }  # fmt: skip
    if name in constants:
        return constants[name]()
    if name not in env:
        raise ValueError(f"{name} has no value")
    return env[name]


def _add(a: Value, b: Value) -> Value:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return _bounded(a + b)
    return _float(a) + _float(b)


def _multiply(a: Value, b: Value) -> Value:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return _bounded(a * b)
    return _float(a) * _float(b)


def _bounded(value: Fraction) -> Fraction:
    if value.numerator.bit_length() + value.denominator.bit_length() > _MAX_BITS:
        raise ValueError("the number is too large")
    return value


def _power(base: Value, exponent: Value) -> Value:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        exact = _exact_power(base, exponent)
        if exact is not None:
            return exact
    base, exponent = _float(base), _float(exponent)
    if base == 0 and not mpmath.re(exponent) > 0:
        raise ValueError("zero to a power that is not positive")
    if base != 0 and not is_infinite(base) and not is_infinite(exponent):
        size = abs(mpmath.log(base) * exponent)
        if size > 1e15:
            raise ValueError("the power is too large")
    return mpmath.power(base, exponent)


def _exact_power(base: Fraction, exponent: Fraction) -> Fraction | None:
    if base == 0:
        if exponent <= 0:
            raise ValueError("zero to a power that is not positive")
        return Fraction(0)
    if abs(exponent.numerator) > _MAX_BITS:
        return Fraction(1) if base == 1 else None
    if exponent.denominator == 1:
        bits = max(base.numerator.bit_length(), base.denominator.bit_length()) * abs(exponent.numerator)
        return base**exponent.numerator if bits <= _MAX_BITS else None
    if base > 0 and exponent.denominator <= 64:
        root = _exact_root(base, exponent.denominator)
        return None if root is None else _exact_power(root, Fraction(exponent.numerator))
    return None


def _exact_root(value: Fraction, degree: int) -> Fraction | None:
    up, down = _integer_root(value.numerator, degree), _integer_root(value.denominator, degree)
    return None if up is None or down is None else Fraction(up, down)


def _integer_root(value: int, degree: int) -> int | None:
    if degree == 2:
        root = math.isqrt(value)
    else:
        low, high = 0, 1 << (value.bit_length() // degree + 1)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if middle**degree <= value else (low, middle - 1)
        root = low
    return root if root**degree == value else None


def _call(name: str, arguments: list[Value]) -> Value:
    # functions of exact numbers stay exact
    if name == "root":
        value, degree = arguments
        if degree == 0:
            raise ValueError("the zeroth root")
        if (
            isinstance(value, Fraction)
            and isinstance(degree, Fraction)
            and value < 0
            and degree.numerator % 2
            and degree.denominator == 1
        ):
            return _multiply(Fraction(-1), _power(-value, 1 / degree))  # the real root: \sqrt[3]{-8} = -2
        return _power(value, 1 / degree if isinstance(degree, Fraction) else 1 / _float(degree))
    if name == "factorial":
        return _factorial(arguments[0])
    if name == "binom":
        return _binomial(*arguments)
    if name in ("gcd", "lcm", "max", "min"):
        return _among(name, arguments)
    if len(arguments) != 1 and name != "log_base":
        raise ValueError(f"{name} takes one argument")
    if name in ("floor", "ceil", "abs"):
        return _rounded(name, arguments[0])
    # what is left is computed in mpmath's precision, apart from logarithms that are exact or have no value
    if name == "log_base":
        base, value = arguments
        return mpmath.log(_float(value)) / mpmath.log(_float(base))
    if name in ("ln", "log", "lg") and arguments[0] == 1:
        return Fraction(0)
    if name in ("ln", "log") and arguments[0] == 0:
        raise ValueError("the logarithm of zero")
    function = _FUNCTIONS.get(name)
    if function is None:
        raise ValueError(f"{name} is not known")
    return function(_float(arguments[0]))


def _factorial(value: Value) -> Value:
    if isinstance(value, Fraction) and value.denominator == 1:
        if not 0 <= value <= _MAX_FACTORIAL:
            raise ValueError("the factorial is too large")
        return Fraction(math.factorial(int(value)))
    if abs(_float(value)) > _MAX_FACTORIAL:
        raise ValueError("the factorial is too large")
    return mpmath.gamma(_float(value) + 1)


def _binomial(n: Value, k: Value) -> Value:
    if isinstance(n, Fraction) and isinstance(k, Fraction) and n.denominator == k.denominator == 1 and 0 <= k <= n:
        if n > _MAX_FACTORIAL:
            raise ValueError("the binomial is too large")
        return Fraction(math.comb(int(n), int(k)))
    if abs(_float(n)) > _MAX_FACTORIAL or abs(_float(k)) > _MAX_FACTORIAL:
        raise ValueError("the binomial is too large")
    return mpmath.binomial(_float(n), _float(k))


def _among(name: str, arguments: list[Value]) -> Value:
    if not arguments:
        raise ValueError(f"{name} of nothing")
    if name in ("max", "min"):
        choose = max if name == "max" else min
        return choose(arguments, key=_float)
    if not all(isinstance(value, Fraction) and value.denominator == 1 for value in arguments):
        raise ValueError(f"{name} of what is no integer")
    whole = [int(value) for value in arguments]
    return Fraction(math.gcd(*whole) if name == "gcd" else math.lcm(*whole))


def _rounded(name: str, value: Value) -> Value:
    if name == "abs":
        return abs(value)
    if isinstance(value, Fraction):
        return Fraction(math.floor(value) if name == "floor" else math.ceil(value))
    return mpmath.floor(value) if name == "floor" else mpmath.ceil(value)


_FUNCTIONS: dict[str, Callable[[Value], Value]] = {
    "sin": mpmath.sin, "cos": mpmath.cos, "tan": mpmath.tan, "cot": mpmath.cot, "sec": mpmath.sec, "csc": mpmath.csc,
    "arcsin": mpmath.asin, "arccos": mpmath.acos, "arctan": mpmath.atan, "arccot": mpmath.acot,
    "sinh": mpmath.sinh, "cosh": mpmath.cosh, "tanh": mpmath.tanh, "coth": mpmath.coth,
    "ln": mpmath.log, "log": mpmath.log, "lg": lambda x: mpmath.log(x) / mpmath.log(10), "exp": mpmath.exp,
}  # fmt: skip


def variants(node: Node) -> list[Node]:
    """Returns the expressions that \\pm and \\mp stand for: one without them, two otherwise, chosen together."""
    if not _has_choice(node):
        return [node]
    return [_chosen(node, sign) for sign in (1, -1)]


def _has_choice(node: Node) -> bool:
    return isinstance(node, Choice) or any(_has_choice(child) for child in children(node))


def _chosen(node: Node, sign: int) -> Node:
    if isinstance(node, Choice):
        return Product((Num(Fraction(sign * node.plus_minus)), _chosen(node.term, sign)))
    return rebuilt(node, lambda child: _chosen(child, sign))

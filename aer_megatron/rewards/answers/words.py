"""Words in answers: units and their spellings, functions, and words that turn a value into something else."""

from __future__ import annotations


def word_set(text: str) -> frozenset[str]:
    """Returns the words of a text."""
    return frozenset(text.split())


FUNCTIONS = word_set(
    """sin cos tan cot sec csc arcsin arccos arctan arccot sinh cosh tanh coth ln log lg exp gcd lcm max min
    det"""
)
# names that stand for themselves
GREEK = word_set(
    """alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau phi chi psi
    omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega ell hbar infty aleph emptyset ldots
    partial nabla angle triangle Re Im"""
)

_SPELLINGS = {
    "mm": "millimeter millimeters millimetre millimetres",
    "cm": "centimeter centimeters centimetre centimetres",
    "dm": "decimeter decimeters",
    "m": "meter meters metre metres",
    "km": "kilometer kilometers kilometre kilometres kms",
    "in": "inch inches",
    "ft": "foot feet",
    "yd": "yard yards",
    "mi": "mile miles",
    "mg": "milligram milligrams",
    "g": "gram grams",
    "kg": "kilogram kilograms kgs",
    "lb": "pound pounds lbs",
    "oz": "ounce ounces",
    "ml": "milliliter milliliters millilitre mL",
    "l": "liter liters litre litres L",
    "gal": "gallon gallons",
    "qt": "quart quarts",
    "s": "second seconds sec secs",
    "min": "minute minutes mins",
    "h": "hour hours hr hrs",
    "day": "days",
    "week": "weeks",
    "month": "months",
    "year": "years yr yrs",
    "degree": "degrees deg",
    "rad": "radian radians",
    "dollar": "dollars USD usd",
    "cent": "cents",
    "euro": "euros EUR",
    "percent": "percentage",
    "mph": "",
    "kph": "kmh",
    "hz": "hertz Hz",
    "n": "newton newtons",
    "j": "joule joules",
    "w": "watt watts",
    "k": "kelvin",
    "v": "volt volts",
    "pa": "pascal pascals Pa",
    "unit": "units",
    "acre": "acres",
    "am": "a.m. AM",
    "pm": "p.m. PM",
}
UNITS: dict[str, str] = {
    spelling: unit for unit, more in _SPELLINGS.items() for spelling in ({unit} - set("mglshnjwkv") | set(more.split()))
}
SINGLE_LETTER_UNITS = frozenset("mglshNJWVKL")
# what stands before or behind a unit's name
POWERS = {"square": 2, "squared": 2, "sq": 2, "cubic": 3, "cubed": 3, "cu": 3}

# words that make of a value another statement
HEDGES = word_set(
    """not no none never nor neither either or more less than least most greater larger fewer smaller between
    about around roughly nearly almost below above under over up maybe perhaps possibly probably cannot
    can't unknown undefined impossible if unless except but only otherwise and to from through until within
    without false wrong incorrect different any every all both half twice double triple times 或 不 非 以上 以下 大约
    约 至少 至多"""
)
# words that end a lead: "the answer is"
LEADS = word_set(
    """is are equals equal be was answer result value solution to of therefore thus so hence
    是 为 等于 答案 答案是 答案为"""
)
ARTICLES = frozenset(("a", "an", "the"))
VERDICTS = {"yes": "no", "no": "yes", "true": "false", "false": "true", "是": "否", "否": "是"}


def unit_of(word: str) -> str:
    """Returns the unit that a word spells; another noun is its own unit, without a plural's s.

    Example: ``unit_of("inches") == "in"``, ``unit_of("apples") == "apple"``
    """
    known = UNITS.get(word) or UNITS.get(word.lower()) or (word if word in SINGLE_LETTER_UNITS else None)
    if known:
        return known
    lower = word.casefold()
    return lower[:-1] if len(lower) > 3 and lower.endswith("s") else lower


def is_measure(unit: str) -> bool:
    """Returns whether a unit measures something ("cm"), unlike a noun that is counted ("apple")."""
    base = unit.split("^")[0].split("/")[0]
    return base in _SPELLINGS and base != "unit"

"""The one alphabet of answers: what Unicode and LaTeX spell in several ways, and the commands that only style.

This file does NOT read texts (spelling.py).
"""

from __future__ import annotations

from aer_megatron.rewards.answers.words import word_set

_UNICODE = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "×": r"\cdot ", "⋅": r"\cdot ", "·": r"\cdot ",
    "∙": r"\cdot ", "✕": r"\cdot ", "∗": r"\cdot ", "÷": r"\div ", "∕": "/", "√": r"\sqrt ", "∛": r"\sqrt[3]",
    "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ", "≠": r"\ne ", "≈": r"\approx ",
    "≡": r"\equiv ", "∪": r"\cup ", "∩": r"\cap ", "∖": r"\setminus ", "∅": r"\emptyset ", "∈": r"\in ",
    "∨": r"\vee ", "∧": r"\wedge ", "±": r"\pm ", "∓": r"\mp ", "°": r"^\circ ", "′": "'", "’": "'",
    "…": r"\ldots ", "⋯": r"\ldots ", "→": r"\to ", "∠": r"\angle ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}",
    "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}", "∣": r"\mid ", "⌊": r"\lfloor ",
    "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "‰": r"\permil ", "。": ".", "、": ", ", "，": ", ",
    "；": ";", "：": ":", "（": "(", "）": ")", "∶": ":", "€": r"\text{euro}", "£": r"\text{pound}",
    "¢": r"\text{cents}", "ℵ": r"\aleph ", "∑": r"\sum ", "∫": r"\int ", "∏": r"\prod ", "ℓ": r"\ell ",
}  # fmt: skip
_GREEK = dict(
    pair.split(":")
    for pair in [
        "α:alpha",
        "β:beta",
        "γ:gamma",
        "δ:delta",
        "ε:epsilon",
        "ζ:zeta",
        "η:eta",
        "θ:theta",
        "ι:iota",
        "κ:kappa",
        "λ:lambda",
        "μ:mu",
        "ν:nu",
        "ξ:xi",
        "π:pi",
        "ρ:rho",
        "σ:sigma",
        "τ:tau",
        "φ:phi",
        "χ:chi",
        "ψ:psi",
        "ω:omega",
        "Γ:Gamma",
        "Δ:Delta",
        "Θ:Theta",
        "Λ:Lambda",
        "Π:Pi",
        "Σ:Sigma",
        "Φ:Phi",
        "Ψ:Psi",
        "Ω:Omega",
    ]
)
_VULGAR = {
    "½": (1, 2), "⅓": (1, 3), "⅔": (2, 3), "¼": (1, 4), "¾": (3, 4), "⅕": (1, 5), "⅖": (2, 5), "⅗": (3, 5),
    "⅘": (4, 5), "⅙": (1, 6), "⅚": (5, 6), "⅛": (1, 8), "⅜": (3, 8), "⅝": (5, 8), "⅞": (7, 8),
}  # fmt: skip
TABLE = str.maketrans(
    _UNICODE
    | {letter: f"\\{name} " for letter, name in _GREEK.items()}
    | {sign: f"\\frac{{{up}}}{{{down}}}" for sign, (up, down) in _VULGAR.items()}
)
_SUPERSCRIPT = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿⁱ", "0123456789+-ni", strict=True))
_SUBSCRIPT = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋ₙ", "0123456789+-n", strict=True))
SCRIPTS = (("^", _SUPERSCRIPT), ("_", _SUBSCRIPT))

# one name for what LaTeX spells in several ways, in front of them
_SPELLINGS = """
    frac dfrac tfrac cfrac nicefrac
    binom dbinom tbinom
    cdot times ast bullet
    le leq leqslant leqq
    ge geq geqslant geqq
    ne neq
    < lt
    > gt
    vee lor
    wedge land
    emptyset varnothing
    setminus backslash smallsetminus
    ldots dots cdots dotsc dotsb vdots ddots
    : colon
    | vert lvert rvert
    [ lbrack
    ] rbrack
    to rightarrow longrightarrow implies Rightarrow
    epsilon varepsilon
    phi varphi
    theta vartheta
    circ degree degrees textdegree
    tan tg
    cot ctg
    cup bigcup
    cap bigcap
    bmod mod
    permil perthousand textperthousand
    overline bar
    infty infin
    neg lnot
"""
ALIASES = {
    spelling: name for name, *spellings in map(str.split, _SPELLINGS.strip().splitlines()) for spelling in spellings
}
SINGLE = {
    "{": "lbrace",
    "}": "rbrace",
    "$": "dollar",
    "%": "percent",
    "&": "ampersand",
    "#": "number",
    "_": "underscore",
}
SPACES = {",", ";", ":", " ", ">", "quad", "qquad", "thinspace", "medspace", "enspace", "newline", "\n", "\t"}
STYLES = word_set(
    """displaystyle textstyle scriptstyle large Large LARGE huge Huge small normalsize left right middle big
    Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr limits nolimits rm bf it ! boldmath mathstrut
    strut nonumber notag displaylimits"""
)
WRAPPERS = word_set(
    """mathrm mathbf mathit mathsf mathnormal boldsymbol bm pmb mathop underline ensuremath fbox boxed phantom
    mathtt bold"""
)
TEXTS = word_set("""text mbox textrm textbf textit textsf texttt textnormal hbox textup emph mathtext""")
ALPHABETS = {"mathbb": "bb", "mathcal": "cal", "mathfrak": "frak", "mathscr": "cal", "Bbb": "bb"}

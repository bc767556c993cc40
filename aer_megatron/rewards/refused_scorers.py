"""Scorers of reasoning-gym that are no rewards, each with its reason.

A test reads the source of the installed version and fails where a scorer that runs text is not in the first table.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_RUNS_ANSWER = "its scorer runs the answer, which the policy wrote, as Python code"
_RUNS_RECORD = "its scorer runs text of the data record as Python code"
_NO_ANSWER = "its items carry no answer that it scores as 1"

REFUSED_SCORERS: Mapping[str, str] = MappingProxyType(
    {
        "binary_matrix": _RUNS_ANSWER,
        "countdown": _RUNS_ANSWER + " (the countdown of this project has a parser of its own)",
        "intermediate_integration": _RUNS_ANSWER,
        "n_queens": _RUNS_ANSWER,
        "polynomial_multiplication": _RUNS_ANSWER,
        "puzzle24": _RUNS_ANSWER,
        "simple_integration": _RUNS_ANSWER,
        "spiral_matrix": _RUNS_ANSWER,
        "string_insertion": _RUNS_ANSWER,
        "bitwise_arithmetic": _RUNS_RECORD,
        "number_sorting": _RUNS_RECORD,
        "codeio": "its generator runs programs that a language model wrote",
        "composite": "it hands the answer to the scorers that its options name, those that run it included",
        "game_of_life_halting": "it scores any text as 1",
        "coin_flip": "it scores 0 as 1 for every probability below 10^-4",
        "complex_arithmetic": "it scores 'nan' as 1",
        "prime_factorization": "its scorer fails on every answer that is no list of integers",
        "boxnet": _NO_ANSWER,
        "graph_color": _NO_ANSWER,
        "propositional_logic": _NO_ANSWER,
        "rubiks_cube": _NO_ANSWER,
        "rush_hour": _NO_ANSWER,
    }
)


def check_scorer(name: str) -> None:
    """Raises ValueError where the scorer called ``name`` is refused."""
    if name in REFUSED_SCORERS:
        raise ValueError(
            f"verifier 'reasoning_gym:{name}' cannot be a reward: {REFUSED_SCORERS[name]}; use another task, or a "
            "function of your own that reads the answer without eval (data.verifier = 'package.module:function')"
        )

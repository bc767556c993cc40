"""Values that a damaged or a hostile file may hold in any of its fields."""

from __future__ import annotations

from hypothesis import strategies as st

NUMBERS = [0, -1, 1, 2**31, 2**63, 2**64, -(2**63) - 1, 10**30, 10**400, 1e308, 5e-324, -0.0]
NUMBERS += [float("nan"), float("inf"), float("-inf")]
TEXTS = ["", "x", "NaN", "1", "x" * 5000, "../x", "a\0b", "\ud800"]
SCALARS = st.sampled_from([*NUMBERS, *TEXTS, True, False, None])
SCALARS = SCALARS | st.integers() | st.floats() | st.text(max_size=20)
JSON = st.recursive(
    SCALARS,
    lambda part: st.lists(part, max_size=4) | st.dictionaries(st.text(max_size=8), part, max_size=4),
    max_leaves=8,
)

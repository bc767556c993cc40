"""Entries of [megatron] whose field is an enumeration reach Megatron-Core as its members."""

from __future__ import annotations

import pytest
from megatron.core.transformer.enums import AttnBackend

from aer_megatron.actor import model


def test_the_name_of_an_enumeration_becomes_its_member() -> None:
    """Megatron-Core compares with members and would ignore the string without a word."""
    given = model._checked_passthrough({"attention_backend": "unfused", "fp8_margin": 1}, {})
    assert given == {"attention_backend": AttnBackend.unfused, "fp8_margin": 1}


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"megatron\.attention_backend='flsh' is unknown; use one of flash, fused"):
        model._checked_passthrough({"attention_backend": "flsh"}, {})

"""Odd uses of the extension raise; none of them crashes the process or reads what is not there."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest

from aer_megatron import _C
from aer_megatron._C import DifficultyLedger, GroupStatistics, LedgerRows

IDS = np.arange(3, dtype=np.uint64)


def make_ledger() -> DifficultyLedger:
    ledger = DifficultyLedger(0.9, 0)
    ledger.update(IDS, np.full(3, 2), np.ones(3, np.int64), np.ones(3), np.ones(3, np.int64), step=0)
    return ledger


@pytest.mark.parametrize("cls", [DifficultyLedger, LedgerRows, GroupStatistics])
def test_no_object_without_content(cls: Any) -> None:
    for new in (cls.__new__, object.__new__):
        with pytest.raises(TypeError, match="not safe"):
            new(cls)


def test_copies_and_pickles_are_refused_not_empty() -> None:
    for item in (make_ledger(), make_ledger().export()):
        with pytest.raises(TypeError):
            copy.copy(item)
        with pytest.raises(TypeError):
            pickle.dumps(item)


@pytest.mark.parametrize("cls", [DifficultyLedger, LedgerRows, GroupStatistics])
def test_members_of_nothing(cls: Any) -> None:
    members = [getattr(cls, name) for name in dir(cls) if not name.startswith("_")] + [getattr(cls, "__len__", None)]
    for member in members:
        call = member.fget if isinstance(member, property) else member
        if call is not None:
            with pytest.raises(TypeError):
                call(None)


def test_unaligned_arrays_are_refused() -> None:
    ledger = make_ledger()
    for offset in range(1, 8):
        crooked = np.zeros(8 * 3 + 8, np.uint8)[offset : offset + 24].view(np.uint64)
        with pytest.raises(ValueError, match=r"prompt_ids must be .* unaligned view.*\.copy\(\)"):
            ledger.lookup(crooked)
        assert len(ledger.lookup(crooked.copy())) == 3


def test_a_second_init_changes_nothing() -> None:
    ledger = make_ledger()
    ledger.__init__(0.5, 0)  # type: ignore[misc]
    assert ledger.decay == 0.9 and len(ledger) == 3
    assert _C.DifficultyLedger is DifficultyLedger

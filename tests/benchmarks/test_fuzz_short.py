"""A short run of benchmarks/reliability/fuzz, and every input that it once found something with."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.reliability.fuzz_report import kept_inputs
from benchmarks.reliability.fuzz_targets import TARGETS
from benchmarks.reliability.fuzz_worker import judge, make_input

SEED = 20_14
NUM_INPUTS = 150  # per reader


@pytest.mark.parametrize("name", TARGETS)
def test_valid_inputs_are_read(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    for valid in target.seeds():
        assert judge(target, valid, valid, tmp_path) == ("value", "")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", TARGETS)
def test_damaged_inputs_are_read_as_they_are_or_refused(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    found = {}
    for index in range(NUM_INPUTS):
        valid, data = make_input(target, SEED, index)
        outcome, what = judge(target, valid, data, tmp_path)
        if outcome not in ("value", "refused"):
            found[index] = what
    assert not found


@pytest.mark.timeout(120)
def test_what_was_found_once_stays_mended(tmp_path: Path) -> None:
    found = []
    for number, (name, was, data) in enumerate(kept_inputs()):
        folder = tmp_path / str(number)
        folder.mkdir()
        outcome, what = judge(TARGETS[name], TARGETS[name].seeds()[0], data, folder)
        if outcome not in ("value", "refused"):
            found.append((name, was, what))
    assert not found

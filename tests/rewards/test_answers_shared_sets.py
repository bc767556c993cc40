"""The judge of answers on the shared pairs and gold answers: precision, recall, and no gold answer refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from aer_megatron.rewards.answers.judge import can_be_read, matches
from aer_megatron.rewards.extract import boxed_answer

SHARED = Path(__file__).resolve().parents[3] / "shared"
PAIRS = SHARED / "cases" / "grading_seen.jsonl"


@pytest.mark.skipif(not PAIRS.is_file(), reason="the shared pairs are not beside the project")
@pytest.mark.parametrize(("adversarial", "precision", "recall"), [(False, 0.98, 0.97), (True, 0.95, 0.93)])
def test_seen_pairs(adversarial: bool, precision: float, recall: float) -> None:
    counts: Counter[tuple[bool, bool]] = Counter()
    for line in PAIRS.open(encoding="utf-8"):
        pair = json.loads(line)
        if adversarial and not pair["adversarial"]:
            continue
        answer = boxed_answer(pair["completion"])
        counts[answer is not None and matches(pair["gold"], answer), pair["want"] == "correct"] += 1
    assert counts[True, True] / (counts[True, True] + counts[True, False]) >= precision
    assert counts[True, True] / (counts[True, True] + counts[False, True]) >= recall


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="the shared data sets are not beside the project")
def test_every_gold_answer_of_the_shared_sets_is_read_and_is_its_own() -> None:
    golds = {
        json.loads(line)["answer"]
        for file in sorted((SHARED / "data").glob("*.jsonl"))
        for line in file.open(encoding="utf-8")
    }
    assert len(golds) > 2500
    assert [gold for gold in golds if not can_be_read(gold) or not matches(gold, f" {gold}. ")] == []

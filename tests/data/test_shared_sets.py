"""Real benchmark sets, where they lie beside the project: they load, and their own gold answers verify."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from aer_megatron.data.records import Record
from aer_megatron.data.sources import load_records
from aer_megatron.options.data import SourceSection
from aer_megatron.rewards.pool import Job, VerifierPool
from aer_megatron.rewards.registry import find_verifier
from aer_megatron.types import Prompt

FOLDER = Path(__file__).parents[3] / "shared" / "data"
SIZES = {
    "gsm8k_train": 7473,
    "gsm8k_test": 1319,
    "math500": 500,
    "aime24": 30,
    "aime25": 30,
    "amc23": 40,
    "dapo_math_17k_dedup": 17255,
}

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="no ../shared/data beside the project")


def load(name: str) -> tuple[Record, ...]:
    source = SourceSection(path=str(FOLDER / f"{name}.jsonl"))
    return load_records(source, on_bad_record="error", default_verifier="math", may_name=lambda name: False).records


@pytest.mark.parametrize(("name", "size"), SIZES.items())
def test_sets_load_whole(name: str, size: int) -> None:
    records = load(name)
    assert len(records) == size
    assert len({record.id for record in records}) == len({(r.problem, r.answer) for r in records})


@pytest.mark.processes
def test_gold_answers_verify() -> None:
    chooser = random.Random(0)
    sampled = [r for name in SIZES for r in chooser.sample(load(name), 30 if name != "math500" else 120)]
    prompts = [Prompt(r.id, r.problem, (1,), r.answer, "math") for r in sampled]
    texts = [rf"\boxed{{0}} no, \boxed{{{r.answer}}}." for r in sampled]
    quick = [find_verifier("math").decide(text, prompt) for text, prompt in zip(texts, prompts, strict=True)]
    jobs = [Job("math", t, p) for t, p, v in zip(texts, prompts, quick, strict=True) if v is None]
    with VerifierPool(num_workers=2, timeout_s=10.0) as pool:
        from_pool = pool.verify(jobs)
    assert 20 < len(jobs) < 150  # both ways of judging were used
    wrong = [job.prompt.answer for job, v in zip(jobs, from_pool, strict=True) if v.reward != 1.0]
    assert wrong == []
    assert {v.reason for v in quick if v is not None} == {"correct"}

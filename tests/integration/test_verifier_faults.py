"""A training run whose verifier does everything that it must not: it goes on, and every fault is counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from aer_megatron.rewards.labels import MAX_LABELS
from tests.support.runs import MODEL, metric_lines, train, write_run_file

pytestmark = pytest.mark.integration
VERIFIER = "tests.support.bad_verifiers:unreliable"
EXPECTED = (
    "crashed",
    "verifier_error_system_exit",
    "verifier_error_key_error",
    "verifier_error_http_error",
    "verifier_error_type_error",
    "verifier_error_value_error",
    "wrong_answer",
    "other",
)


def test_a_verifier_that_fails_in_every_way_does_not_end_the_run(tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(MODEL)).float().save_pretrained(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "base" / name).write_bytes((MODEL / name).read_bytes())
    records = [{"problem": f"{n},1,2,3={n + 6}>", "answer": str(n)} for n in range(1, 30)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    run_file = write_run_file(tmp_path)
    procedural = 'task = "countdown"\nsize = 50\noptions = { split = "train" }'
    table = run_file.read_text(encoding="utf-8")
    assert procedural in table
    run_file.write_text(table.replace(procedural, f'path = "{tmp_path}/data.jsonl"'), encoding="utf-8")
    done = train(
        run_file,
        "--run.num_steps=2",
        "--eval.sets={}",
        "--run.checkpoint_every=0",
        f"--data.verifier={VERIFIER}",
        "--rollout.prompts_per_step=16",
        "--rollout.group_size=8",
    )
    assert done.returncode == 0, done.stderr
    prefix = "rewards/reason/"
    lines = metric_lines(tmp_path / "out")
    assert len(lines) == 2
    for line in lines:
        counts = {name.removeprefix(prefix): count for name, count in line.items() if name.startswith(prefix)}
        assert sum(counts.values()) == 16 * 8
        assert MAX_LABELS <= len(counts) <= MAX_LABELS + 1  # a label for every text, the rest under "other"
    seen = {name.removeprefix(prefix) for line in lines for name in line}
    assert seen >= set(EXPECTED)
    assert f'verifier {VERIFIER}: "KeyError' in done.stderr

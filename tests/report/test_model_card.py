"""The model card of an export: its scores are those of the policy, and options show no secret and break no table."""

from __future__ import annotations

from typing import Any

from aer_megatron.report.model_card import model_card
from tests.support.policies import policy_config

RECORDS: list[dict[str, Any]] = [
    {"step": 0, "eval/aime24/pass@1": 0.1, "eval/aime24/pass@1_low": 0.05, "eval/aime24/pass@1_high": 0.2},
    {"step": 4, "eval/aime24/pass@1": 0.25, "eval/aime24/pass@1_low": 0.125, "eval/aime24/pass@1_high": 0.5,
     "eval/aime24/truncated": 0.3, "eval/math500/avg@4": 0.75, "eval/math500/maj@4": None},
    {"step": 5, "reward/mean": 0.9},
    {"step": 8, "eval/aime24/pass@1": 0.9},
]  # fmt: skip


def card(records: list[dict[str, Any]], step: int, **sections: Any) -> str:
    return model_card(policy_config(**sections), records, step=step, version="1.2.3")


def test_the_scores_are_those_of_the_newest_evaluation_up_to_the_step() -> None:
    text = card(RECORDS, 6)
    assert "Of the policy after 4 steps." in text
    rows = [line for line in text.splitlines() if line.startswith(("| aime24", "| math500"))]
    assert rows == [
        "| aime24 | pass@1 | 0.250 | 0.125 to 0.500 |",
        "| math500 | avg@4 | 0.750 |  |",
        "| math500 | maj@4 |  |  |",
    ]
    assert "Of the policy after 8 steps." in card(RECORDS, 8)
    assert "## Evaluation\n\nNone." in card(RECORDS[2:3], 6)


def test_it_says_where_the_policy_comes_from() -> None:
    text = card([], 6, model={"path": "/models/Qwen3-8B"}, run={"name": "mine\n# <b>other</b>"})
    assert text.startswith("---\nlibrary_name: transformers\n")
    assert 'base_model: "Qwen3-8B"' in text and "`Qwen3-8B` after 6 steps" in text and "AER-Megatron 1.2.3" in text
    assert "\n# mine # bother/b, step 6\n" in text


def test_options_are_those_of_the_run_file_without_secrets() -> None:
    text = card([], 6, sglang={"environment": {"HF_TOKEN": "hf_sesame"}}, data={"instruction": "a | `b`\n{problem}"})
    assert '| `model.dtype` | `"fp32"` |' in text
    assert "run.seed" not in text  # a default
    assert "sesame" not in text and '| `sglang.environment.HF_TOKEN` | `"***"` |' in text
    assert "| `data.instruction` | `\"a \\| 'b'\\n{problem}\"` |" in text

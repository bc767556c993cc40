"""The README.md of an exported policy: where it comes from, how it was evaluated, and the options of its run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aer_megatron.config import Config
from aer_megatron.report.masking import mask_table
from aer_megatron.report.metrics import EVALUATION, Metric
from aer_megatron.report.writer import flat_options

CARD_FILE = "README.md"
_SCORES = ("pass@K", "maj@K", "avg@K")


def model_card(config: Config, records: Sequence[Mapping[str, Any]], *, step: int, version: str) -> str:
    """Returns the card of the policy after ``step`` steps; ``records`` are those of metrics.jsonl.

    Its scores are those of the newest evaluation up to that step, which the card names. Secrets are masked.
    """
    base, rollout = Path(config.model.path).name, config.rollout
    options = mask_table(config.model_dump(mode="json", exclude_unset=True))
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            f"base_model: {json.dumps(base)}",
            "tags: [reinforcement-learning, rlvr]",
            "---",
            "",
            f"# {_plain(config.run.name)}, step {step}",
            "",
            f"The policy {_code(base)} after {step} steps of reinforcement learning with verifiable rewards, each of "
            f"{rollout.prompts_per_step} prompts x {rollout.group_size} answers; {config.model.dtype} weights. Made by "
            f"AER-Megatron {version}.",
            "",
            "## Evaluation",
            "",
            *_evaluation(records, step),
            "",
            "## Options of the run",
            "",
            "| option | value |",
            "|---|---|",
            *(f"| {_code(name)} | {_code(json.dumps(value))} |" for name, value in flat_options(options)),
            "",
        ]
    )


def _evaluation(records: Sequence[Mapping[str, Any]], step: int) -> list[str]:
    evaluated = [record for record in records if record[Metric.STEP] <= step and any(map(_is_score, record))]
    if not evaluated:
        return ["None."]
    newest = evaluated[-1]
    rows = []
    for name in filter(_is_score, newest):
        _, set_name, measure = name.split("/")
        low, high = newest.get(f"{name}_low"), newest.get(f"{name}_high")
        interval = "" if low is None or high is None else f"{low:.3f} to {high:.3f}"
        value = newest[name]
        rows.append(f"| {set_name} | {measure} | {'' if value is None else f'{value:.3f}'} | {interval} |")
    return [
        f"Of the policy after {newest[Metric.STEP]} steps.",
        "",
        "| set | measure | value | 95 % interval |",
        "|---|---|---|---|",
        *rows,
    ]


def _is_score(name: str) -> bool:
    return any(EVALUATION[measure].matches(name) for measure in _SCORES)


def _plain(text: str) -> str:
    return " ".join(text.split()).translate(str.maketrans("", "", "<>[]`*_|\\"))


def _code(text: str) -> str:
    """Returns text as a code span that ends neither itself nor its table's cell."""
    return f"`{' '.join(text.split()).replace('`', chr(39)).replace('|', chr(92) + '|')}`"

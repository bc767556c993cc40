"""Judges answers to reasoning-gym problems by the generator's own scorer, in a worker process.

Those scorers pay partial credit for a gold answer found anywhere in a text, so the answer is extracted first
(rewards/extract.py) and only a score of 1 counts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from aer_megatron.rewards.extract import final_answer
from aer_megatron.rewards.refused_scorers import check_scorer
from aer_megatron.types import Prompt, Verdict

_INTEGER = re.compile(r"-?[0-9]{1,100}")
_NUMBER = re.compile(r"[-+]?[0-9]+(?:\.[0-9]+)?")


def decide_quickly(text: str, prompt: Prompt) -> Verdict | None:
    """Returns ``no_answer`` where there is no text to score, else None."""
    return None if final_answer(text) else Verdict(0.0, "no_answer")


def is_other_number(answer: str, gold: str) -> bool:
    """Whether ``gold`` is an integer and the first number of ``answer`` another one: some scorers drop its sign.

    Example: ``is_other_number("-5 apples", "5") and not is_other_number("5.0", "5")``
    """
    if not _INTEGER.fullmatch(gold.strip()):
        return False
    first = _NUMBER.search(answer.replace(",", ""))
    return first is not None and Decimal(first.group()) != Decimal(gold)


class ReasoningGymVerifier:
    """The scorer of one generator; ``prompt.metadata`` holds the "item" and the generator's "options"."""

    def __init__(self, name: str) -> None:
        check_scorer(name)
        from reasoning_gym import create_dataset
        from reasoning_gym.factory import DATASETS

        if name not in DATASETS:
            known = ", ".join(sorted(DATASETS))
            raise ValueError(f"verifier 'reasoning_gym:{name}' is unknown; reasoning-gym has {known}")
        self._create_dataset = create_dataset
        self._name = name
        self._datasets: dict[str, Any] = {}

    def __call__(self, text: str, prompt: Prompt) -> Verdict:
        """Returns the verdict; reasons ``correct``, ``wrong``, ``no_answer``.

        Raises:
            ValueError: the prompt carries no reasoning-gym item.
        """
        answer = final_answer(text)
        if not answer:
            return Verdict(0.0, "no_answer")
        if "item" not in prompt.metadata:
            raise ValueError(f"a prompt of verifier reasoning_gym:{self._name} must carry its item in metadata")
        item = prompt.metadata["item"]
        score = self._dataset(prompt.metadata.get("options", {})).score_answer(answer, item)
        right = score >= 1.0 and not is_other_number(answer, str(item["answer"]))
        return Verdict(1.0, "correct") if right else Verdict(0.0, "wrong")

    def _dataset(self, options: Mapping[str, Any]) -> Any:
        key = json.dumps(dict(options), sort_keys=True, default=str)
        if key not in self._datasets:
            self._datasets[key] = self._create_dataset(self._name, size=1, seed=0, **options)
        return self._datasets[key]

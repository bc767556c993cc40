"""Judges answers to reasoning-gym problems by the generator's own scorer, in a worker process.

Those scorers pay partial credit for a gold answer found anywhere in a text, so the answer is extracted first
(rewards/extract.py) and only a score of 1 counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from aer_megatron.rewards.extract import final_answer
from aer_megatron.types import Prompt, Verdict


def decide_quickly(text: str, prompt: Prompt) -> Verdict | None:
    """Returns ``no_answer`` where there is no text to score, else None."""
    return None if final_answer(text) else Verdict(0.0, "no_answer")


class ReasoningGymVerifier:
    """The scorer of one generator; ``prompt.metadata`` holds the "item" and the generator's "options"."""

    def __init__(self, name: str) -> None:
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
            raise ValueError(
                f"a prompt of verifier reasoning_gym:{self._name} must carry its item in metadata"
            )
        score = self._dataset(prompt.metadata.get("options", {})).score_answer(
            answer, prompt.metadata["item"]
        )
        return Verdict(1.0, "correct") if score >= 1.0 else Verdict(0.0, "wrong")

    def _dataset(self, options: Mapping[str, Any]) -> Any:
        key = json.dumps(dict(options), sort_keys=True, default=str)
        if key not in self._datasets:
            self._datasets[key] = self._create_dataset(self._name, size=1, seed=0, **options)
        return self._datasets[key]

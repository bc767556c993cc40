"""A verifier whose rewards are finite in float64 and infinite in float32, for some prompts."""

from __future__ import annotations

from aer_megatron.types import Prompt, Verdict


def giant(text: str, prompt: Prompt) -> Verdict:
    """Returns 1e300 for half of the answers to the prompts whose answer is "giant"."""
    huge = prompt.answer == "giant" and len(text) % 2 == 0
    return Verdict(1e300 if huge else float(len(text) % 3 == 0), "length")

"""Rewards that are finite in float64 and infinite in float32, for some prompts; a trainer without its bound on rewards.

    python -m tests.support.giant_rewards RUN.toml ...      the command line of training, which believes such rewards

The project refuses rewards beyond a million. What an update does with a batch that is not finite all the same is tested
with the bound lifted: here in the trainer, and in its worker processes when they import the verifier.
"""

from __future__ import annotations

import sys

from aer_megatron.rewards import messages, registry
from aer_megatron.types import Prompt, Verdict

messages.MAX_REWARD = registry.MAX_REWARD = 1e308


def giant(text: str, prompt: Prompt) -> Verdict:
    """Returns 1e300 for half of the answers to the prompts whose answer is "giant"."""
    huge = prompt.answer == "giant" and len(text) % 2 == 0
    return Verdict(1e300 if huge else float(len(text) % 3 == 0), "length")


if __name__ == "__main__":
    from aer_megatron.train import main

    sys.exit(main())

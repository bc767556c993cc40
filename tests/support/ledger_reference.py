"""A plain-Python difficulty ledger with exact fractions: the oracle of the C++ one.

Every visit (step, attempts, successes, nats, tokens) of a prompt is kept, and every sum is made anew from
them when asked for: nothing is incremental, nothing is hashed, nothing is shared with the code under test.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray


@dataclass
class ReferenceLedger:
    """Per-prompt history, every visit remembered."""

    decay: float
    visits: dict[int, list[tuple[int, int, int, float, int]]] = field(default_factory=dict)

    def update(
        self,
        prompt_ids: NDArray[np.uint64],
        attempts: NDArray[np.int64],
        successes: NDArray[np.int64],
        entropy_sum: NDArray[np.float64],
        token_count: NDArray[np.int64],
        *,
        step: int,
    ) -> None:
        """Remember one batch."""
        columns = (attempts.tolist(), successes.tolist(), entropy_sum.tolist(), token_count.tolist())
        for prompt_id, *values in zip(prompt_ids.tolist(), *columns):
            self.visits.setdefault(prompt_id, []).append((step, *values))

    def decayed(self, prompt_id: int, step: int | None = None) -> tuple[float, float]:
        """Return (successes, failures) decayed to `step`, or to the prompt's last one."""
        visits = self.visits.get(prompt_id, [])
        at = max((v[0] for v in visits), default=0) if step is None else step
        decay = Fraction(self.decay)
        wins = sum((v[2] * decay ** (at - v[0]) for v in visits), Fraction(0))
        losses = sum(((v[1] - v[2]) * decay ** (at - v[0]) for v in visits), Fraction(0))
        return float(wins), float(losses)

    def row(self, prompt_id: int) -> dict[str, float]:
        """Return the prompt's record; zeros and last_step -1 where it is unknown."""
        visits = self.visits.get(prompt_id, [])
        wins, losses = self.decayed(prompt_id)
        return {
            "prompt_ids": prompt_id,
            "decayed_successes": wins,
            "decayed_failures": losses,
            "attempts": sum(v[1] for v in visits),
            "successes": sum(v[2] for v in visits),
            "last_step": max((v[0] for v in visits), default=-1),
            "entropy_sum": float(sum((Fraction(v[3]) for v in visits), Fraction(0))),
            "token_count": sum(v[4] for v in visits),
        }

    def posterior_mean(self, prompt_id: int, prior_success: float, prior_failure: float, step: int) -> float:
        """Return (a + ds) / (a + ds + b + df) at `step`."""
        wins, losses = self.decayed(prompt_id, step)
        return (prior_success + wins) / (prior_success + wins + prior_failure + losses)


def reference_group_statistics(
    group_ids: NDArray[np.int64], rewards: NDArray[np.float64], *, std_epsilon: float, divide_by_std: bool
) -> dict[str, NDArray[np.generic]]:
    """Return the fields of `GroupStatistics`, computed group by group with NumPy."""
    order = list(dict.fromkeys(group_ids.tolist()))
    members = [rewards[group_ids == group] for group in order]
    mean = np.array([m.mean() for m in members])
    std = np.array([m.std(ddof=1) if len(m) > 1 else 0.0 for m in members])
    index = np.array([order.index(group) for group in group_ids.tolist()], dtype=np.int64)
    advantage = rewards - mean[index]
    return {
        "group_ids": np.array(order, dtype=np.int64),
        "counts": np.array([len(m) for m in members], dtype=np.int64),
        "successes": np.array([int((m >= 1.0).sum()) for m in members], dtype=np.int64),
        "mean": mean,
        "std": std,
        "advantage": advantage / (std[index] + std_epsilon) if divide_by_std else advantage,
        "group_index": index,
    }

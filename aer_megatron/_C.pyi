"""C++ extension: ragged group statistics, the difficulty ledger, balanced partition. No torch, no global
state.

Arrays are one-dimensional, C-contiguous, aligned and of exactly the dtype named here; another dtype is a
TypeError, another shape, a strided or an unaligned view a ValueError. Legend: P prompts or groups, B rollouts.
Calls release the GIL.
"""

from typing import ClassVar, Never, final

import numpy as np
from numpy.typing import NDArray

@final
class GroupStatistics:
    """Statistics of P groups over B rollouts; groups are in the order of their first appearance."""

    def __init__(self, *args: Never, **kwargs: Never) -> None:
        """Raises TypeError: `group_statistics` makes these."""
    @property
    def group_ids(self) -> NDArray[np.int64]:
        """[P] the caller's ids."""
    @property
    def counts(self) -> NDArray[np.int64]:
        """[P] rollouts of the group."""
    @property
    def successes(self) -> NDArray[np.int64]:
        """[P] rollouts whose reward is at least 1."""
    @property
    def mean(self) -> NDArray[np.float64]:
        """[P] mean reward."""
    @property
    def std(self) -> NDArray[np.float64]:
        """[P] unbiased standard deviation (n - 1, as torch.std); 0 for a group of one."""
    @property
    def advantage(self) -> NDArray[np.float64]:
        """[B] group-relative advantage."""
    @property
    def group_index(self) -> NDArray[np.int64]:
        """[B] position in the [P] arrays of the rollout's group."""

def group_statistics(
    group_ids: NDArray[np.int64], rewards: NDArray[np.float64], *, std_epsilon: float, divide_by_std: bool
) -> GroupStatistics:
    """Return counts, successes, mean, unbiased std and advantages of ragged groups.

    `group_ids` [B] int64 in any order, `rewards` [B] float64. The advantage is (R - mean) / (std +
    std_epsilon), GRPO (Shao et al. 2024, DeepSeekMath); with divide_by_std=False it is R - mean, Dr. GRPO
    (Liu et al. 2025). The std is the unbiased one (n - 1), 0 for one rollout; a reward equal to its group's
    mean has advantage 0, also when std_epsilon is 0. Two passes of compensated sums in input order: same
    input, same bits. Raises ValueError for unequal lengths, a reward that is not finite, std_epsilon < 0.
    """

@final
class LedgerRows:
    """Records of P prompts as columns; what `lookup` and `export` return."""

    def __init__(self, *args: Never, **kwargs: Never) -> None:
        """Raises TypeError: `lookup` and `export` make these."""
    @property
    def prompt_ids(self) -> NDArray[np.uint64]:
        """[P]"""
    @property
    def decayed_successes(self) -> NDArray[np.float64]:
        """[P] sum of successes * decay^(last_step - their step)."""
    @property
    def decayed_failures(self) -> NDArray[np.float64]:
        """[P] the same sum of failures."""
    @property
    def attempts(self) -> NDArray[np.int64]:
        """[P] rollouts ever, exact."""
    @property
    def successes(self) -> NDArray[np.int64]:
        """[P] successful rollouts ever, exact."""
    @property
    def last_step(self) -> NDArray[np.int64]:
        """[P] step of the last update; -1: prompt unknown."""
    @property
    def entropy_sum(self) -> NDArray[np.float64]:
        """[P] token entropies ever, summed, in nats (a multiple of 2^-30)."""
    @property
    def token_count(self) -> NDArray[np.int64]:
        """[P] response tokens ever: over attempts the mean length, under entropy_sum the mean token entropy."""
    def as_dict(self) -> dict[str, NDArray[np.generic]]:
        """Return the columns by name, in the order above."""
    def __len__(self) -> int:
        """Number of rows."""

@final
class DifficultyLedger:
    """Per-prompt history of rollouts, keyed by a 64-bit prompt id, at most 64 bytes a prompt.

    Integers are exact over the ledger's life; decayed sums forget by `decay` per step. Entropy sums are kept
    in units of 2^-30 nat and decayed sums round to 2^-32 when they decay, so every addition is exact: a
    step's batch may be split and reordered with bitwise the same result. Per prompt and lifetime: fewer than
    2^32 attempts and tokens, 4.2e9 nats. Threads may share a ledger: readers run together, writers alone.
    """

    __hash__: ClassVar[None]  # type: ignore[assignment]

    def __init__(self, decay: float, capacity_hint: int) -> None:
        """Raises ValueError unless 0 < decay <= 1 (1 never forgets) and capacity_hint (prompts) >= 0."""
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
        """Add one batch: [P] arrays, entropy_sum in nats. Prompts may repeat; their entries add up.

        Raises ValueError, with the ledger unchanged, for unequal lengths, successes outside [0, attempts], negative or
        non-finite values, a step before a prompt's last one (it names the prompt and both steps).
        """
    def lookup(self, prompt_ids: NDArray[np.uint64]) -> LedgerRows:
        """Return the prompts' records in the order asked for; unknown prompts have zeros and last_step -1."""
    def posterior_mean(
        self, prompt_ids: NDArray[np.uint64], *, prior_success: float, prior_failure: float, step: int
    ) -> NDArray[np.float64]:
        """Return [P] Beta posterior means (a + ds) / (a + ds + b + df), the decayed sums taken at `step`.

        a, b are the prior's pseudo-counts; an unknown prompt has the prior mean. Raises ValueError for a
        prior that is not positive and for a step before a prompt's last one.
        """
    def histogram2d(
        self,
        difficulty_edges: NDArray[np.float64],
        entropy_edges: NDArray[np.float64],
        *,
        prior_success: float,
        prior_failure: float,
        step: int,
    ) -> NDArray[np.int64]:
        """Return prompt counts [D - 1, E - 1] by difficulty (1 - posterior mean) and mean token entropy
        (nats).

        Edges [D], [E] ascend strictly; bins are half-open, the last one closed, as in numpy.histogram2d;
        prompts without tokens or outside of the edges are not counted.
        """
    def quantiles(
        self, q: NDArray[np.float64], *, prior_success: float, prior_failure: float, step: int
    ) -> NDArray[np.float64]:
        """Return [Q] quantiles of difficulty, 1 - posterior mean, as numpy.quantile; ValueError when empty."""
    def copy(self) -> DifficultyLedger:
        """Return another ledger with the same records, which no later update of this one reaches."""
    def export(self) -> LedgerRows:
        """Return all records sorted by prompt id: equal ledgers export equal arrays."""
    def save(self, path: str) -> None:
        """Write the ledger to a file through a temporary file of its own, fsync and rename. Raises OSError.

        Several threads and processes may save to one path: the file is always a whole one, of one of them.

        Little-endian: "AERLEDGR", format version 2 (u32), record bytes (u32), decay (f64), count (u64), 48-byte
        records sorted by their key, XXH64 of all before it (u64). A record is key (u64), decayed successes and
        failures (f64), entropy sum in 2^-30 nat (i64), tokens, attempts, successes (u32), last step (i32); the
        key is splitmix64(prompt id), a bijection. Equal ledgers write equal files.
        """
    @staticmethod
    def load(path: str, *, decay: float | None = None) -> DifficultyLedger:
        """Return the ledger in a file.

        Raises OSError if it cannot be read and ValueError, naming the file and the cause, if it is no regular file,
        truncated, corrupt, no ledger, of another format version or, where `decay` is given, of another decay, or if a
        record breaks what every update keeps, such as decayed sums within the lifetime counts.
        """
    @property
    def decay(self) -> float:
        """Factor per step by which old rollouts count less."""
    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
    def __len__(self) -> int:
        """Number of prompts."""
    def __eq__(self, other: object) -> bool:
        """Whether decay and all records are equal to the bit."""

def balanced_partition(weights: NDArray[np.int64], num_parts: int, *, equal_size: bool) -> NDArray[np.int64]:
    """Return [B] the part of each sequence such that the heaviest part is light.

    The better of longest-first (Graham 1969) and the differencing method (Karmarkar and Karp 1982). No part
    is empty; with equal_size none holds two sequences more than another. Parts are numbered by their first
    sequence; the same weights give the same parts. ValueError unless 1 <= num_parts <= B, all weights >= 0.
    """

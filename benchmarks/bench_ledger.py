"""Times of the difficulty ledger beside NumPy and pandas, one table on standard output.

    .venv/bin/python benchmarks/bench_ledger.py --prompts 1000000

Each row adds a batch of (prompt, verdict) pairs to a state of as many prompts; CPU seconds of the best of `--repeats`
runs, so that neighbours on the machine count less. This file does NOT judge the figures.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from aer_megatron._C import DifficultyLedger

DECAY = 0.97
Update = Callable[[int], None]


def best_cpu_ms(update: Update, repeats: int) -> float:
    """Return the smallest CPU time of `repeats` calls, in ms; each call gets the next step."""
    times = []
    for step in range(1, repeats + 1):
        start = time.process_time()
        update(step)
        times.append(time.process_time() - start)
    return min(times) * 1e3


def ledger_update(ids: np.ndarray, pairs: np.ndarray, wins: np.ndarray) -> tuple[DifficultyLedger, Update]:
    """Return a ledger that knows `ids`, and its update."""
    ledger = DifficultyLedger(DECAY, len(ids))

    def update(step: int, prompts: np.ndarray = pairs, successes: np.ndarray = wins) -> None:
        one = np.ones(len(prompts), dtype=np.int64)
        ledger.update(prompts, one, successes, one.astype(np.float64), one, step=step)

    update(0, ids, np.zeros(len(ids), dtype=np.int64))
    return ledger, update


def numpy_update(ids: np.ndarray, pairs: np.ndarray, wins: np.ndarray) -> Update:
    """Return the best NumPy form found: positions by searchsorted in sorted ids, sums by bincount."""
    known, n = np.sort(ids), len(ids)
    sums = {name: np.zeros(n) for name in ("wins", "losses", "attempts", "successes", "nats", "tokens")}
    last = np.zeros(n, dtype=np.int64)
    nats = np.ones(len(pairs))

    def update(step: int) -> None:
        at = np.searchsorted(known, pairs)
        attempts = np.bincount(at, minlength=n)
        successes = np.bincount(at, weights=wins, minlength=n)
        seen = attempts > 0
        factor = np.where(seen, DECAY ** (step - last), 1.0)
        sums["wins"] = sums["wins"] * factor + successes
        sums["losses"] = sums["losses"] * factor + (attempts - successes)
        sums["attempts"] += attempts
        sums["successes"] += successes
        sums["nats"] += np.bincount(at, weights=nats, minlength=n)
        sums["tokens"] += attempts
        last[seen] = step

    return update


def pandas_update(ids: np.ndarray, pairs: np.ndarray, wins: np.ndarray) -> Update:
    """Return the pandas form: group the batch by prompt, merge it into the state."""
    names = ["wins", "losses", "attempts", "successes", "nats", "tokens", "last"]
    state = pd.DataFrame({name: np.zeros(len(ids)) for name in names}, index=pd.Index(ids))

    def update(step: int) -> None:
        nonlocal state
        batch = pd.DataFrame({"id": pairs, "n": 1.0, "successes": wins, "nats": 1.0})
        added = batch.groupby("id", sort=False).sum().reindex(state.index, fill_value=0.0)
        factor = DECAY ** (step - state["last"])
        state = pd.DataFrame(
            {
                "wins": state["wins"] * factor + added["successes"],
                "losses": state["losses"] * factor + added["n"] - added["successes"],
                "attempts": state["attempts"] + added["n"],
                "successes": state["successes"] + added["successes"],
                "nats": state["nats"] + added["nats"],
                "tokens": state["tokens"] + added["n"],
                "last": float(step),
            }
        )

    return update


def file_rates(ledger: DifficultyLedger) -> tuple[float, float]:
    """Return MB/s of save (with fsync) and of load, by the wall clock."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.bin"
        start = time.perf_counter()
        ledger.save(str(path))
        saved = time.perf_counter()
        DifficultyLedger.load(str(path))
        loaded = time.perf_counter()
        megabytes = path.stat().st_size / 1e6
    return megabytes / (saved - start), megabytes / (loaded - saved)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1_000_000)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    ids = rng.permutation(np.unique(rng.integers(0, 2**63, options.prompts, dtype=np.uint64)))
    pairs, wins = rng.choice(ids, options.pairs), rng.integers(0, 2, options.pairs)

    ledger, update = ledger_update(ids, pairs, wins)
    ours = best_cpu_ms(update, options.repeats)
    print(f"{platform.machine()}, {len(ids)} prompts, {options.pairs} pairs, CPU ms, best of {options.repeats}")
    print(f"ledger {ours:10.1f}")
    for name, other in [("numpy", numpy_update(ids, pairs, wins)), ("pandas", pandas_update(ids, pairs, wins))]:
        taken = best_cpu_ms(other, options.repeats)
        print(f"{name:6} {taken:10.1f}   {taken / ours:.1f} x the ledger's")
    save, load = file_rates(ledger)
    print(
        f"bytes per prompt {ledger.nbytes / len(ledger):.1f}, save {save:.0f} MB/s, load {load:.0f} MB/s (wall clock)"
    )


if __name__ == "__main__":
    main()

"""Times of the difficulty ledger beside NumPy and pandas; writes benchmarks/results/ledger.{md,json}.

    .venv/bin/python benchmarks/bench_ledger.py    # 1M pairs, 10M-prompt file and growth; some 3 GB of memory

**Update.** A batch of (prompt id, verdict) pairs, one per rollout, unsorted and with repetitions, is added to a
state that knows all prompts: per prompt the decayed successes and failures, attempts, successes and last step.
Every form does that work and is checked against the ledger afterwards. What differs, all in the peers' favour:
they keep no entropy and token sums, do not accept unknown prompts, do not check for steps that go back or counters
that overflow, and are not safe against a reader in another thread. They are:
  numpy searchsorted   positions by binary search in sorted ids, sums by one bincount
  numpy sorted         each verdict's ids sorted, then binary searches in order (cache-friendly)
  numpy hash           open addressing written with array operations, table built beforehand; the best found
  pandas reindex       groupby, then reindex of the batch's sums to the state's index; the best pandas form found
  pandas merge         groupby, then DataFrame.merge into the state by id, the form as people write it
Times are the smallest of `--repeats` calls, as CPU time of the process and as wall clock. CPU time is what a
shared machine leaves comparable; with two threads only the wall clock shows a gain, and only where two cores are
free.

**File.** Save and load of 10M prompts, best of 3. On disk the save includes its fsync, so that the
disk's speed is in it; on memory-backed storage (/dev/shm) fsync costs nothing and the code's own speed shows.

**Growth.** Batches of 4096 new prompts from an empty ledger to 10M: how long single updates take; the wall clock
counts other processes' turns too.

This file does NOT judge the figures.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from aer_megatron._C import DifficultyLedger

DECAY = 0.97
MAX_STEPS = 1000
RESULTS = Path(__file__).parent / "results"
STATE = ("wins", "losses", "attempts", "successes", "last")
Update = Callable[[int], None]


class NumpyState:
    """The peers' state: one array per column, one entry per known prompt."""

    def __init__(self, size: int) -> None:
        self.columns = {name: np.zeros(size) for name in STATE[:2]}
        self.columns |= {name: np.zeros(size, dtype=np.int64) for name in STATE[2:]}
        self.powers = DECAY ** np.arange(MAX_STEPS)

    def add(self, losses: np.ndarray, wins: np.ndarray, step: int) -> None:
        """Add counts per known prompt; powers from a table, because DECAY ** array costs 20 ms."""
        state, attempts = self.columns, losses + wins
        seen = attempts > 0
        factor = np.where(seen, self.powers[step - state["last"]], 1.0)
        for name, added in (("wins", wins), ("losses", losses)):
            state[name] *= factor
            state[name] += added
        state["attempts"] += attempts
        state["successes"] += wins
        np.copyto(state["last"], step, where=seen)

    def add_at(self, positions: np.ndarray, solved: np.ndarray, step: int) -> None:
        """Add one rollout per position."""
        size = len(self.columns["last"])
        counts = np.bincount(2 * positions + solved, minlength=2 * size).reshape(size, 2)
        self.add(counts[:, 0], counts[:, 1], step)


def searchsorted_update(ids: np.ndarray, pairs: np.ndarray, solved: np.ndarray) -> tuple[Update, Any]:
    known, state = np.sort(ids), NumpyState(len(ids))
    return lambda step: state.add_at(np.searchsorted(known, pairs), solved, step), (known, state)


def sorted_update(ids: np.ndarray, pairs: np.ndarray, solved: np.ndarray) -> tuple[Update, Any]:
    known, state = np.sort(ids), NumpyState(len(ids))

    def count(chosen: np.ndarray) -> np.ndarray:
        return np.bincount(np.searchsorted(known, np.sort(chosen)), minlength=len(known))

    return lambda step: state.add(count(pairs[~solved]), count(pairs[solved]), step), (known, state)


def hash_update(ids: np.ndarray, pairs: np.ndarray, solved: np.ndarray) -> tuple[Update, Any]:
    bits = int(np.ceil(np.log2(len(ids)))) + 1  # half empty
    mask, shift, odd = (1 << bits) - 1, np.uint64(64 - bits), np.uint64(0x9E3779B97F4A7C15)
    keys, positions = np.zeros(1 << bits, dtype=np.uint64), np.full(1 << bits, -1)
    state = NumpyState(len(ids))

    def home(values: np.ndarray) -> np.ndarray:
        return ((values * odd) >> shift).astype(np.int64)

    left, slot = np.arange(len(ids)), home(ids)
    while len(left):
        free = positions[slot] < 0
        positions[slot[free]] = left[free]  # of several that want one slot the last one gets it
        placed = positions[slot] == left
        keys[slot[placed]] = ids[left[placed]]
        left, slot = left[~placed], (slot[~placed] + 1) & mask

    def update(step: int) -> None:
        slots = home(pairs)
        missed = np.flatnonzero(keys[slots] != pairs)
        while len(missed):
            slots[missed] = (slots[missed] + 1) & mask
            missed = missed[keys[slots[missed]] != pairs[missed]]
        state.add_at(positions[slots], solved, step)

    return update, (ids, state)


def pandas_update(ids: np.ndarray, pairs: np.ndarray, solved: np.ndarray, *, merge: bool) -> tuple[Update, Any]:
    frame = pd.DataFrame({name: np.zeros(len(ids)) for name in STATE}, index=pd.Index(ids, name="id"))
    holder = {"state": frame.reset_index() if merge else frame}

    def update(step: int) -> None:
        state = holder["state"]
        batch = pd.DataFrame({"id": pairs, "n": 1.0, "k": solved.astype(np.float64)})
        groups = batch.groupby("id", sort=False).sum()
        if merge:
            joined = state.merge(groups.reset_index(), on="id", how="left").fillna({"n": 0.0, "k": 0.0})
        else:
            joined = groups.reindex(state.index, fill_value=0.0)
        n, k = joined["n"], joined["k"]
        factor = np.where(n > 0, DECAY ** (step - state["last"]), 1.0)
        columns = {
            "wins": state["wins"] * factor + k,
            "losses": state["losses"] * factor + (n - k),
            "attempts": state["attempts"] + n,
            "successes": state["successes"] + k,
            "last": np.where(n > 0, float(step), state["last"]),
        }
        holder["state"] = pd.DataFrame(({"id": state["id"]} if merge else {}) | columns)

    return update, (ids, holder)


def best_times(update: Update, repeats: int) -> tuple[float, float]:
    """Return the smallest (CPU, wall) times of `repeats` calls in ms; each call gets the next step."""
    cpu, wall = [], []
    for step in range(1, repeats + 1):
        start, cpu_start = time.perf_counter(), time.process_time()
        update(step)
        cpu.append(time.process_time() - cpu_start)
        wall.append(time.perf_counter() - start)
    return min(cpu) * 1e3, min(wall) * 1e3


def check_same(ledger: DifficultyLedger, ids: np.ndarray, holder: Any) -> None:
    """Raise unless a peer's state equals the ledger's after the same updates."""
    rows = ledger.lookup(ids)
    state = holder.columns if isinstance(holder, NumpyState) else holder["state"]
    expected = {
        "wins": rows.decayed_successes,
        "losses": rows.decayed_failures,
        "attempts": rows.attempts,
        "successes": rows.successes,
    }
    for name, column in expected.items():
        np.testing.assert_allclose(np.asarray(state[name]), column, rtol=0, atol=1e-6, err_msg=name)


def time_updates(num_prompts: int, num_pairs: int, repeats: int) -> list[dict[str, Any]]:
    """Return one row per form, the ledger's first."""
    rng = np.random.default_rng(0)
    ids = rng.permutation(np.unique(rng.integers(0, 2**63, num_prompts, dtype=np.uint64)))
    pairs, solved = rng.choice(ids, num_pairs), rng.integers(0, 2, num_pairs).astype(bool)
    count, none, zeros = np.ones(num_pairs, dtype=np.int64), np.zeros(len(ids), dtype=np.int64), np.zeros(num_pairs)
    wins = solved.astype(np.int64)
    rows = []

    def ledger() -> DifficultyLedger:
        made = DifficultyLedger(DECAY, len(ids))
        made.update(ids, none, none, none.astype(np.float64), none, step=0)
        return made

    def update_verdicts(target: DifficultyLedger, threads: int, step: int) -> None:
        target.update_verdicts(pairs, solved, step=step, num_threads=threads)

    def record(name: str, update: Update) -> None:
        cpu, wall = best_times(update, repeats)
        rows.append({"form": name, "cpu_ms": cpu, "wall_ms": wall})
        print(f"{name:24} cpu {cpu:8.1f} ms   wall {wall:8.1f} ms", flush=True)

    reference = ledger()
    for threads in (1, 2):
        target = reference if threads == 1 else ledger()
        name = f"ledger pairs, {threads} thread{'s' * (threads > 1)}"
        record(name, functools.partial(update_verdicts, target, threads))
    full = ledger()
    record("ledger all columns", lambda step: full.update(pairs, count, wins, zeros, count, step=step))
    peers = {
        "numpy searchsorted": searchsorted_update(ids, pairs, solved),
        "numpy sorted": sorted_update(ids, pairs, solved),
        "numpy hash": hash_update(ids, pairs, solved),
        "pandas reindex": pandas_update(ids, pairs, solved, merge=False),
        "pandas merge": pandas_update(ids, pairs, solved, merge=True),
    }
    for name, (update, (known, holder)) in peers.items():
        record(name, update)
        check_same(reference, known, holder)
    return rows


def time_growth(num_prompts: int, batch: int) -> tuple[DifficultyLedger, dict[str, float]]:
    """Return the grown ledger and its figures."""
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 2**64, num_prompts, dtype=np.uint64)
    ledger, most_bytes = DifficultyLedger(DECAY, 0), 0.0
    times: dict[str, list[float]] = {"wall": [], "CPU": []}
    ones, nats = np.ones(batch, dtype=np.int64), np.ones(batch)
    for start in range(0, num_prompts, batch):
        part = ids[start : start + batch]
        n, begin, cpu_begin = len(part), time.perf_counter(), time.process_time()
        ledger.update(part, ones[:n], ones[:n], nats[:n], ones[:n], step=0)
        times["CPU"].append(time.process_time() - cpu_begin)
        times["wall"].append(time.perf_counter() - begin)
        if start >= 100_000 and start % (64 * batch) == 0:
            most_bytes = max(most_bytes, ledger.nbytes / len(ledger))
    figures = {}
    for clock, taken in times.items():
        for place, q in (("median", 0.5), ("99.9 %", 0.999), ("worst", 1.0)):
            figures[f"{place} update of {batch} new prompts, {clock} ms"] = float(np.quantile(taken, q)) * 1e3
    figures["bytes per prompt at the end"] = ledger.nbytes / len(ledger)
    figures["bytes per prompt at most, from 100,000 prompts on"] = most_bytes
    return ledger, figures


def time_file(ledger: DifficultyLedger, folder: str | None, repeats: int) -> dict[str, float]:
    """Return MB/s of save (with fsync), load and both, best of `repeats`, by the wall clock and by CPU time."""
    best: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        path = Path(temporary) / "ledger.bin"
        for _ in range(repeats):
            marks = [(time.perf_counter(), time.process_time())]
            ledger.save(str(path))
            marks.append((time.perf_counter(), time.process_time()))
            DifficultyLedger.load(str(path))
            marks.append((time.perf_counter(), time.process_time()))
            megabytes = path.stat().st_size / 1e6
            for clock, name in enumerate(("wall", "CPU")):
                start, saved, loaded = (mark[clock] for mark in marks)
                rates = {"save": megabytes / (saved - start), "load": megabytes / (loaded - saved)}
                rates["save + load"] = 2 * megabytes / (loaded - start)
                for kind, rate in rates.items():
                    label = f"{kind}, MB per {name} second"
                    best[label] = max(best.get(label, 0.0), rate)
    return best


def render(results: dict[str, Any]) -> str:
    """Return the Markdown page of the results."""
    ours = results["updates"][0]
    lines = [
        "# Difficulty ledger",
        "",
        f"`python benchmarks/bench_ledger.py` on {results['machine']}; the forms are described in that file.",
        "",
        f"## {results['pairs']:,} (prompt, verdict) pairs into {results['prompts']:,} known prompts",
        "",
        "| form | CPU ms | wall ms | CPU, ledger = 1 |",
        "|---|---|---|---|",
        *(
            f"| {row['form']} | {row['cpu_ms']:.1f} | {row['wall_ms']:.1f} | {row['cpu_ms'] / ours['cpu_ms']:.1f} |"
            for row in results["updates"]
        ),
        "",
        f"## {results['file_prompts']:,} prompts",
        "",
        "| what | figure |",
        "|---|---|",
        *(f"| {name} | {value:.2f} |" for name, value in results["growth"].items()),
        *(f"| disk, with fsync: {name} | {value:.0f} |" for name, value in results["disk"].items()),
        *(f"| memory-backed: {name} | {value:.0f} |" for name, value in results["memory"].items()),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1_000_000)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--file-prompts", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of ledger.md and ledger.json")
    options = parser.parse_args()
    updates = time_updates(options.prompts, options.pairs, options.repeats)
    ledger, growth = time_growth(options.file_prompts, batch=4096)
    print(growth, flush=True)
    disk = time_file(ledger, None, repeats=3)
    memory = time_file(ledger, "/dev/shm", repeats=3) if os.access("/dev/shm", os.W_OK) else {}
    print("disk", disk, "memory-backed", memory)
    results = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores (load {os.getloadavg()[0]:.1f} during the run)",
        "versions": {"numpy": np.__version__, "pandas": pd.__version__},
        "prompts": options.prompts,
        "pairs": options.pairs,
        "file_prompts": options.file_prompts,
        "updates": updates,
        "growth": growth,
        "disk": disk,
        "memory": memory,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "ledger.json").write_text(json.dumps(results, indent=2) + "\n")
    (options.output / "ledger.md").write_text(render(results))


if __name__ == "__main__":
    main()

"""Times of the difficulty ledger beside NumPy and pandas; writes benchmarks/results/ledger.{md,json}.

    .venv/bin/python -m benchmarks.bench_ledger    # up to 10M prompts; some 3 GB of memory

**Update.** What a training step does: 64, 512 or 4096 prompts, unsorted, each with its attempts and successes, are
added to a state that knows 10^5, 10^6 or 10^7 prompts. Every form adds the same batches, each call another one, and is
checked against the ledger afterwards. What differs, all in the peers' favour: they keep no entropy and token sums,
accept neither unknown nor repeated prompts, do not check for steps that go back or counters that overflow, and are not
safe against a reader in another thread. They find the positions of the batch's prompts and then add to one array per
column:
  numpy searchsorted   binary search in sorted ids
  numpy hash           open addressing written with array operations, table built beforehand
  pandas               Index.get_indexer, which is a hash table in C
Times are the median and the smallest of `--repeats` calls by the wall clock, in microseconds.

**Read.** The posterior means of as many prompts, which the difficulty of a step asks for.

**File.** Save and load of 10M prompts, best of 3. On disk the save includes its fsync, so that the
disk's speed is in it; on memory-backed storage (/dev/shm) fsync costs nothing and the code's own speed shows.

**Growth.** Batches of 4096 new prompts from an empty ledger to 10M: how long single updates take; the wall clock
counts other processes' turns too. A run does not grow its ledger, it says how many prompts its data has.

This file does NOT judge the figures.
"""

from __future__ import annotations

import argparse
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

from aer_megatron._C import DifficultyLedger, LedgerRows

DECAY = 0.97
BATCHES, GROUP = (64, 512, 4096), 16
RESULTS = Path(__file__).parent / "results"
STATE = ("wins", "losses", "attempts", "successes", "last")
Positions = Callable[[np.ndarray], np.ndarray]
Batch = tuple[np.ndarray, np.ndarray]  # prompt ids, successes of GROUP attempts


class Columns:
    """The peers' state: one array per column, one entry per known prompt."""

    def __init__(self, size: int, positions: Positions) -> None:
        self.columns = {name: np.zeros(size) for name in STATE[:2]}
        self.columns |= {name: np.zeros(size, dtype=np.int64) for name in STATE[2:]}
        self.positions = positions
        self.powers = DECAY ** np.arange(1000)

    def update(self, batch: Batch, step: int) -> None:
        """Add a batch; powers from a table, because DECAY ** array costs more than all the rest."""
        ids, wins = batch
        at, state = self.positions(ids), self.columns
        factor = self.powers[step - state["last"][at]]
        state["wins"][at] = state["wins"][at] * factor + wins
        state["losses"][at] = state["losses"][at] * factor + (GROUP - wins)
        state["attempts"][at] += GROUP
        state["successes"][at] += wins
        state["last"][at] = step


class Ledger:
    """The ledger with all prompts known."""

    def __init__(self, ids: np.ndarray) -> None:
        none = np.zeros(len(ids), dtype=np.int64)
        self.ledger = DifficultyLedger(DECAY, len(ids))
        self.ledger.update(ids, none, none, none.astype(np.float64), none, step=0)

    def update(self, batch: Batch, step: int) -> None:
        ids, wins = batch
        attempts = np.full(len(ids), GROUP)
        self.ledger.update(ids, attempts, wins, attempts * 1.0, attempts, step=step)


def hash_positions(ids: np.ndarray) -> Positions:
    bits = int(np.ceil(np.log2(len(ids)))) + 1  # half empty
    mask, shift, odd = (1 << bits) - 1, np.uint64(64 - bits), np.uint64(0x9E3779B97F4A7C15)
    keys, positions = np.zeros(1 << bits, dtype=np.uint64), np.full(1 << bits, -1)

    def home(values: np.ndarray) -> np.ndarray:
        return ((values * odd) >> shift).astype(np.int64)

    left, slot = np.arange(len(ids)), home(ids)
    while len(left):
        free = positions[slot] < 0
        positions[slot[free]] = left[free]  # of several that want one slot the last one gets it
        placed = positions[slot] == left
        keys[slot[placed]] = ids[left[placed]]
        left, slot = left[~placed], (slot[~placed] + 1) & mask

    def find(batch: np.ndarray) -> np.ndarray:
        slots = home(batch)
        missed = np.flatnonzero(keys[slots] != batch)
        while len(missed):
            slots[missed] = (slots[missed] + 1) & mask
            missed = missed[keys[slots[missed]] != batch[missed]]
        return positions[slots]

    return find


PEERS: dict[str, Callable[[np.ndarray], Positions]] = {
    "numpy searchsorted": lambda ids: lambda batch: np.searchsorted(ids, batch),
    "numpy hash": hash_positions,
    "pandas": lambda ids: pd.Index(ids).get_indexer,
}


def times_us(call: Callable[[int], object], repeats: int) -> dict[str, float]:
    """Return the median and the smallest time of call(0), call(1), ..., microseconds by the wall clock."""
    taken = []
    for number in range(repeats):
        start = time.perf_counter()
        call(number)
        taken.append((time.perf_counter() - start) * 1e6)
    return {"median": float(np.median(taken)), "best": min(taken)}


def time_steps(known: int, repeats: int) -> list[dict[str, Any]]:
    """Return one row per form and size of batch."""
    rng = np.random.default_rng(0)
    ids = np.unique(rng.integers(0, 2**63, known, dtype=np.uint64))
    batches = [
        (ids[rng.choice(len(ids), size, replace=False)], rng.integers(0, GROUP + 1, size))
        for size in BATCHES
        for _ in range(repeats)
    ]
    rows: list[dict[str, Any]] = []

    def record(form: str, update: Callable[[Batch, int], object]) -> None:
        for place, size in enumerate(BATCHES):
            first = place * repeats

            def one(call: int, first: int = first) -> object:
                return update(batches[first + call], first + call + 1)

            taken = times_us(one, repeats)
            rows.append({"form": form, "known": known, "prompts": size, **taken})
            print(rows[-1], flush=True)

    ours = Ledger(ids)
    record("ledger", ours.update)
    for name, make in PEERS.items():
        peer = Columns(len(ids), make(ids))
        record(name, peer.update)
        check_same(ours.ledger.lookup(ids), peer)
        del peer
    prior = {"prior_success": 1.0, "prior_failure": 1.0}
    record("ledger, read", lambda batch, step: ours.ledger.posterior_mean(batch[0], **prior, step=len(batches)))
    return rows


def check_same(rows: LedgerRows, peer: Columns) -> None:
    """Raise unless a peer's state equals the ledger's after the same updates."""
    expected = (rows.decayed_successes, rows.decayed_failures, rows.attempts, rows.successes)
    for name, column in zip(STATE, expected):
        np.testing.assert_allclose(peer.columns[name], column, rtol=0, atol=1e-6, err_msg=name)


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


def step_table(rows: list[dict[str, Any]]) -> list[str]:
    """Return Markdown: a line per form and number of known prompts, a column per size of batch."""
    lines = [
        "| known | form | " + " | ".join(f"{size} prompts" for size in BATCHES) + " |",
        "|---|---|" + "---|" * len(BATCHES),
    ]
    ours = {(row["known"], row["prompts"]): row["median"] for row in rows if row["form"] == "ledger"}
    for known, form in dict.fromkeys((row["known"], row["form"]) for row in rows):
        cells = []
        for row in rows:
            if (row["known"], row["form"]) == (known, form):
                ratio = row["median"] / ours[known, row["prompts"]]
                cells.append(f"{row['median']:.0f} ({row['best']:.0f}), {ratio:.1f} times")
        lines.append(f"| {known:,} | {form} | " + " | ".join(cells) + " |")
    return lines


def render(results: dict[str, Any]) -> str:
    """Return the Markdown page of the results."""
    lines = [
        "# Difficulty ledger",
        "",
        f"`python -m benchmarks.bench_ledger` on {results['machine']}; the forms are described in that file.",
        "",
        "## One step's update: median (best) in microseconds, and the median as a multiple of the ledger's",
        "",
        *step_table(results["updates"]),
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
    parser.add_argument("--known", type=int, nargs="+", default=[10**5, 10**6, 10**7], help="known prompts")
    parser.add_argument("--file-prompts", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of ledger.md and ledger.json")
    options = parser.parse_args()
    updates = [row for known in options.known for row in time_steps(known, options.repeats)]
    ledger, growth = time_growth(options.file_prompts, batch=4096)
    print(growth, flush=True)
    disk = time_file(ledger, None, repeats=3)
    memory = time_file(ledger, "/dev/shm", repeats=3) if os.access("/dev/shm", os.W_OK) else {}
    print("disk", disk, "memory-backed", memory)
    results = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores (load {os.getloadavg()[0]:.1f} during the run)",
        "versions": {"numpy": np.__version__, "pandas": pd.__version__},
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

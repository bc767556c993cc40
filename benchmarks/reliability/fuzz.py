"""Hundreds of thousands of damaged inputs to every reader of the project: none may crash, hang or be misread.

    python -m benchmarks.reliability.fuzz --out runs/reliability/fuzz --inputs 200000

Run files, overrides, data files, manifests, ledgers, metrics and flight records, model folders, server replies,
verifier messages and answers, each from valid ones by seeded mutations (fuzz_mutators.py). An input must be read as
what it is or be refused with the exception that the reader documents. Worker processes with a limit of time and memory
try them; what crashes, hangs, raises something else or is accepted with another meaning is kept in
FOLDER/findings/*.json. The inputs of benchmarks/reliability/seeds/ (what was found once) are tried first. Interrupted,
the same command goes on. Writes fuzz.md and result.json into FOLDER. Exit codes: 0 no finding, 1 findings.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.reliability.fuzz_report import SEEDS, keep, write_report
from benchmarks.reliability.fuzz_targets import TARGETS
from benchmarks.reliability.fuzz_worker import SHARED, Batch, finding, make_input
from benchmarks.reliability.records import load
from tests.support.runs import ROOT, environment

_BATCH = 5000
_POLL_S = 0.1
_WALL_FACTOR = 12  # a waiting input is a hang after so many times its limit: the machine may be busy
_START_S = 300.0
_CONFIRM_S = 1.0


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one input: seconds of CPU, and bytes of memory beyond what the reader's imports take."""

    seconds: float
    memory_bytes: int


class Worker:
    """One process on one batch."""

    def __init__(self, batch: Batch, seed: int, folder: Path, limits: Limits) -> None:
        self.batch = batch
        name = f"{batch.target}-{batch.start}"
        self._shared = folder / "work" / f"{name}.shared"
        self.report = folder / "work" / f"{name}.jsonl"
        self._shared.parent.mkdir(parents=True, exist_ok=True)
        self._shared.write_bytes(SHARED.pack(-1, time.monotonic(), 0.0))
        self.report.unlink(missing_ok=True)
        given = {
            "target": batch.target, "start": batch.start, "stop": batch.stop, "seed": seed,
            "shared": str(self._shared), "report": str(self.report), "seconds": limits.seconds,
            "memory": limits.memory_bytes,
        }  # fmt: skip
        self._limit_s = limits.seconds
        self._suspect: tuple[int, float] | None = None  # an input that looked overdue, and when
        self._log = folder / "work" / f"{name}.log"
        with self._log.open("wb") as log:
            command = [sys.executable, "-m", "benchmarks.reliability.fuzz_worker", json.dumps(given)]
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def current(self) -> tuple[int, float, float]:
        """Returns the input under way (-1: none), the seconds since it began, and those of CPU it used."""
        raw = self._shared.read_bytes()
        while raw != (raw := self._shared.read_bytes()):  # it was being written
            pass
        index, began, cpu_before = SHARED.unpack(raw)
        return index, time.monotonic() - began, _cpu_seconds(self.process.pid) - cpu_before

    def overdue(self) -> str:
        """Returns why the input under way has gone on too long, "" where it has not, or not for two looks."""
        index, waited, used = self.current()
        reason = ""
        if index < 0:
            reason = f"did not start within {_START_S:.0f} s" if waited > _START_S else ""
        elif used > 2 * self._limit_s:
            reason = f"more than {used:.0f} s of CPU"
        elif waited > _WALL_FACTOR * self._limit_s:
            reason = f"{waited:.0f} s, {used:.0f} s of CPU"
        now = time.monotonic()
        if not reason or self._suspect is None or self._suspect[0] != index:
            self._suspect = (index, now) if reason else None
            return ""
        return reason if now - self._suspect[1] > _CONFIRM_S else ""

    def tail(self) -> str:
        return self._log.read_bytes()[-1500:].decode(errors="replace")

    def discard(self) -> None:
        """Ends the process and removes its files."""
        self.process.kill()
        self.process.wait()
        for path in (self._shared, self.report, self._log):
            path.unlink(missing_ok=True)


class Fuzz:
    """All targets' inputs, a few batches at a time; what is done lies in FOLDER/state.json."""

    def __init__(self, folder: Path, seed: int, limits: Limits, num_workers: int) -> None:
        self._folder, self._seed, self._limits, self._num_workers = folder, seed, limits, num_workers
        (folder / "findings").mkdir(parents=True, exist_ok=True)
        self._state_file = folder / "state.json"
        self.state: dict[str, Any] = {"seed": seed, "seconds": 0.0, "counts": {}, "kinds": {}, "loads": [], "done": {}}
        if self._state_file.exists():
            self.state = json.loads(self._state_file.read_text("utf-8"))
            if self.state["seed"] != seed:
                raise SystemExit(f"{folder} holds a run with --seed {self.state['seed']}; take another --out")

    def run(self, wanted: dict[str, int]) -> None:
        """Returns when every target has had its inputs."""
        waiting = [batch for name, count in wanted.items() for batch in self._batches(name, count)]
        waiting.sort(key=lambda batch: batch.start)  # all targets advance together
        running: list[Worker] = []
        before_s, began = self.state["seconds"], time.monotonic()
        try:
            while waiting or running:
                while waiting and len(running) < self._num_workers:
                    running.append(Worker(waiting.pop(0), self._seed, self._folder, self._limits))
                for worker in list(running):
                    rest = self._look(worker)
                    if rest is not None:
                        running.remove(worker)
                        waiting[:0] = rest
                        self.state["seconds"] = before_s + time.monotonic() - began
                        self.state["loads"].append(load())
                        self._save()
                time.sleep(_POLL_S)
        finally:
            for worker in running:
                worker.discard()

    def _batches(self, name: str, count: int) -> list[Batch]:
        """Returns the batches of a target that are still to be tried: what is done is a list of ranges."""
        todo, place = [], 0
        done = sorted(self.state["done"].get(name, []))
        for start, stop in [*done, [count, count]]:
            while place < min(start, count):
                end = min(place + _BATCH, start, count)
                todo.append(Batch(name, place, end))
                place = end
            place = max(place, stop)
        return todo

    def _look(self, worker: Worker) -> list[Batch] | None:
        """Returns None while the worker is at work, else what is left of its batch."""
        batch, code = worker.batch, worker.process.poll()
        problem = worker.overdue() if code is None else ""
        if code is None and not problem:
            return None
        index = worker.current()[0]
        if code == 0:
            self._take(worker, batch.stop)
            rest = []
        elif index < 0:  # not the fault of an input
            raise RuntimeError(f"a worker for {batch} ended with {code} {problem}:\n{worker.tail()}")
        else:
            outcome = "hang" if code is None else "crash"
            what = problem or f"exit code {code}: {worker.tail()}"
            data = make_input(TARGETS[batch.target], self._seed, index)[1]
            self._keep(finding(batch.target, self._seed, index, outcome, what, data))
            self._count(batch.target, outcome, 1)
            self._take(worker, index)
            self._done(batch.target, index, index + 1)
            rest = [Batch(batch.target, index + 1, batch.stop)] if index + 1 < batch.stop else []
        worker.discard()
        return rest

    def _take(self, worker: Worker, stop: int) -> None:
        """Counts what a worker reported; inputs before ``stop`` are done."""
        rows = (
            [json.loads(line) for line in worker.report.read_text("utf-8").splitlines()]
            if worker.report.exists()
            else []
        )
        name, counted = worker.batch.target, 0
        for row in rows:
            if "counts" not in row:
                self._keep(row)
                continue
            for outcome, count in row["counts"].items():
                self._count(name, outcome, count)
                counted += count
            for kind, count in row["kinds"].items():
                key = f"{name}: {kind}"
                self.state["kinds"][key] = self.state["kinds"].get(key, 0) + count
        if not counted:  # its word on the inputs before the crash is lost, but they were tried
            self._count(name, "uncounted", stop - worker.batch.start)
        self._done(name, worker.batch.start, stop)

    def _count(self, name: str, outcome: str, count: int) -> None:
        table = self.state["counts"].setdefault(name, {})
        table[outcome] = table.get(outcome, 0) + count

    def _done(self, name: str, start: int, stop: int) -> None:
        if stop > start:
            self.state["done"].setdefault(name, []).append([start, stop])

    def _keep(self, row: dict[str, Any]) -> None:
        path = self._folder / "findings" / f"{row['target']}-{row['index']}.json"
        path.write_text(json.dumps(row, indent=1) + "\n", "utf-8")

    def _save(self) -> None:
        beside = self._state_file.with_suffix(".new")
        beside.write_text(json.dumps(self.state, indent=1) + "\n", "utf-8")
        os.replace(beside, self._state_file)


def shares(num_inputs: int, names: Sequence[str]) -> dict[str, int]:
    """Returns how many inputs each target gets, by its share, rounded up."""
    total = sum(TARGETS[name].share for name in names)
    return {name: -(-num_inputs * TARGETS[name].share // total) for name in names}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder; one that holds an earlier part goes on")
    parser.add_argument("--inputs", type=int, default=200_000, help="of all targets together")
    parser.add_argument("--seconds-per-input-limit", type=float, default=5.0, help="CPU seconds")
    parser.add_argument("--memory-mb", type=int, default=1024, help="per worker, beyond its imports")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="only add the findings in --out to the kept inputs")
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated; default: %(default)s")
    given = parser.parse_args(arguments)
    names = given.targets.split(",")
    if unknown := [name for name in names if name not in TARGETS]:
        parser.error(f"unknown targets {unknown}; use some of {list(TARGETS)}")
    folder = given.out.absolute()
    if given.keep:
        print(f"{keep(folder)} inputs added to {SEEDS}")
        return 0
    limits = Limits(given.seconds_per_input_limit, given.memory_mb * 10**6)
    fuzz = Fuzz(folder, given.seed, limits, given.workers)
    fuzz.run(shares(given.inputs, names))
    return write_report(folder, fuzz.state, given.inputs)


def _cpu_seconds(pid: int) -> float:
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(words[11]) + int(words[12])) / float(os.sysconf("SC_CLK_TCK"))


if __name__ == "__main__":
    sys.exit(main())

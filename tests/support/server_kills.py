"""Runs of the command line in which servers are killed with SIGKILL in the middle of generating, at random moments.

A moment is the n-th answer to /generate over all servers, n drawn at random: the other requests of that step are under
way then. A kill takes either the server's main process alone or, all at once, everything that the server started.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aer_megatron._C import DifficultyLedger
from aer_megatron.report.writer import read_metrics
from tests.support.real_servers import processes_writing
from tests.support.runs import ROOT, environment

_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Kill:
    """One kill: which server, in which step, and whether only its main process."""

    server: int
    step: int
    main_only: bool


@dataclass(frozen=True, slots=True)
class KillPlan:
    """How many servers are killed, how often, over how many answers to /generate, and the seed of the moments."""

    num_servers: int
    num_kills: int
    num_requests: int  # of the whole run, without repetitions
    seed: int


@dataclass(frozen=True, slots=True)
class KilledRun:
    """What a run with kills left."""

    kills: list[Kill]
    stderr: str
    attempts: int  # of the difficulty ledger: rollouts that were counted
    step_s: list[float]

    @property
    def lost_s(self) -> float:
        """Returns the seconds per kill that steps took beyond the median of those without one."""
        faulty = {kill.step for kill in self.kills}
        quiet = [seconds for step, seconds in enumerate(self.step_s) if step not in faulty and step > 0]
        typical = float(np.median(quiet))
        return sum(self.step_s[step] - typical for step in faulty if step < len(self.step_s)) / len(self.kills)

    def summary(self) -> str:
        """Returns what the kills cost, in words."""
        back = sorted(float(seconds) for seconds in re.findall(r"is back after ([0-9.]+) s", self.stderr))
        where = f"restarts took {back[0]:.1f} to {back[-1]:.1f} s" if back else "none was back before the end"
        return (
            f"{len(self.kills)} kills in {len({kill.step for kill in self.kills})} of {len(self.step_s)} steps; "
            f"{self.lost_s:.2f} s lost per kill; {len(back)} restarts finished, {where}"
        )


def run_with_kills(
    command: list[str], output: Path, plan: KillPlan, *, variables: Mapping[str, str], limit_s: float
) -> KilledRun:
    """Returns a finished run, started with ``variables`` added to the environment.

    Raises:
        AssertionError: the run failed, or ended before the last kill.
    """
    chance = random.Random(plan.seed)
    moments = sorted(chance.sample(range(1, int(0.9 * plan.num_requests)), plan.num_kills))
    logs = [output / "sglang" / f"server-{index}.log" for index in range(plan.num_servers)]
    kills: list[Kill] = []
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment() | dict(variables),
        cwd=ROOT,
    )
    deadline = time.monotonic() + limit_s
    while process.poll() is None and len(kills) < plan.num_kills and time.monotonic() < deadline:
        if sum(_num_generated(log) for log in logs) < moments[len(kills)]:
            time.sleep(_POLL_S)
            continue
        victims = {i: own for i, log in enumerate(logs) if _serves(log) and (own := _server_processes(log))}
        if victims:
            index, main_only = chance.choice(sorted(victims)), chance.random() < 0.5
            kills.append(Kill(index, _num_steps(output), main_only))
            for victim in victims[index][: 1 if main_only else None]:
                os.kill(victim, signal.SIGKILL)
    try:
        _, stderr = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
    finally:
        process.kill()
    assert process.returncode == 0, stderr
    assert len(kills) == plan.num_kills, f"the run ended after {len(kills)} of {plan.num_kills} kills\n{stderr}"
    checkpoint = max((output / "checkpoints").glob("step_*"), key=lambda path: int(path.name[5:]))
    attempts = int(DifficultyLedger.load(str(checkpoint / "ledger")).export().attempts.sum())
    step_s = [float(str(line["time/step_s"])) for line in read_metrics(output / "metrics.jsonl")]
    return KilledRun(kills, stderr, attempts, step_s)


def _serves(log: Path) -> bool:
    """Returns whether the server's newest process was given weights."""
    newest_start = log.read_text(errors="replace").rpartition("--model-path")[2]
    return "/update_weight_version" in newest_start


def _server_processes(log: Path) -> list[int]:
    """Returns a server's own processes, the main one first; without its guard."""
    own = [pid for pid in processes_writing(log) if b"guard.py" not in _command_line(pid)]
    return sorted(own)


def _command_line(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b"guard.py"  # it has ended: not one to kill


def _num_generated(log: Path) -> int:
    """Returns how many /generate calls a server answered after its first weights: the ones before warm it up."""
    try:
        return log.read_text(errors="replace").partition("/update_weight_version")[2].count("POST /generate")
    except OSError:
        return 0


def _num_steps(output: Path) -> int:
    try:
        return (output / "metrics.jsonl").read_text().count("\n")
    except OSError:
        return 0

"""Hours of training with two real SGLang servers, faults and saves: do memory, descriptors and threads stay flat?

    python -m benchmarks.reliability.soak --hours 2 --out runs/reliability/soak

Two training ranks under a launcher, two servers that the run launched, a checkpoint every 50 steps. Now and then a
server or a verifier process is killed (SIGKILL), and one verdict in 20,000 never comes. Every ten seconds the memory,
the descriptors and the threads of launcher, ranks and verifier processes are written to records.jsonl. Started again
with the same --out it goes on from the run's last checkpoint and adds to the hours already spent. Needs
tools/install_sglang_cpu.sh. Writes soak.md and soak.png beside the records; --report only does that.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.reliability.process_tree import end_all, held_by, kill, processes_naming, run_processes, servers_below
from benchmarks.reliability.records import Records, last_step, load, source_commit_name
from benchmarks.reliability.soak_report import write_report
from benchmarks.reliability.tiny_run import SERVER_SECTIONS, launch_command, servers_python, write_run
from tests.support.runs import ROOT, environment

PROBLEMS = 2000  # a prompt that was tokenised once is kept: all of them are within the warm-up
SAMPLED = ("launcher", "rank", "verifier guard", "verifier", "server")
_STOP_S = 180.0  # a rank finishes its step and saves
_GONE_S = 30.0  # what a stopped run started
_FAILED_LAUNCHES = 5


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds between samples, and on average between kills of a server and of a verifier process."""

    sample_s: float
    server_kill_s: float
    verifier_kill_s: float


class Soak:
    """One run of the harness over a folder that may hold earlier ones."""

    def __init__(self, folder: Path, hours: float, pace: Pace) -> None:
        self._folder = folder
        self._records = Records(folder)
        self._pace = pace
        self._spent_s = max((row["spent_s"] for row in self._records.rows if "spent_s" in row), default=0.0)
        self._wanted_s = hours * 3600.0
        self._chance = random.Random(time.time_ns())
        self._stopping = False

    def run(self, run_file: Path, command: Callable[[], list[str]]) -> int:
        """Returns 0 when the hours are over, 1 where the run ended by itself too often, 3 when it was interrupted."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        failures = 0
        while not self._stopping and self._spent_s < self._wanted_s:
            end_all(processes_naming(run_file), wait_s=0.0)  # of a harness that was killed
            code = self._launch(command())
            failures += code is not None
            if code == 0 or failures >= _FAILED_LAUNCHES:
                return 1
        return 3 if self._stopping else 0

    def _launch(self, command: list[str]) -> int | None:
        """Returns the exit code of a launch that ended by itself, None where it was stopped."""
        log = self._folder / "output.log"
        with log.open("ab") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip
        self._records.add("launch", pid=process.pid, spent_s=self._spent_s, commit=source_commit_name(), load=load())
        try:
            code = self._watch(process)
            if code is not None:
                self._records.add("ended", code=code, spent_s=self._spent_s, output=_tail(log))
            return code
        finally:
            self._end(process)

    def _watch(self, process: subprocess.Popen[bytes]) -> int | None:
        began, before_s = time.monotonic(), self._spent_s
        next_sample = began
        next_kill = {role: self._moment(role) for role in ("server", "verifier")}
        while not self._stopping and self._spent_s < self._wanted_s:
            if process.poll() is not None:
                return process.returncode
            now = time.monotonic()
            self._spent_s = before_s + now - began
            if now >= next_sample:
                next_sample = max(next_sample + self._pace.sample_s, now)
                self._sample(process.pid)
            for role, moment in next_kill.items():
                if now >= moment:
                    next_kill[role] = self._moment(role)
                    self._kill(process.pid, role)
            time.sleep(0.5)
        return None

    def _moment(self, role: str) -> float:
        mean = self._pace.server_kill_s if role == "server" else self._pace.verifier_kill_s
        return time.monotonic() + mean * self._chance.uniform(0.5, 1.5)

    def _sample(self, launcher: int) -> None:
        processes = []
        for process in run_processes(launcher):
            if process.role in SAMPLED and (held := held_by(process.pid)) is not None:
                processes.append({"role": process.role, "rank": process.rank, "pid": process.pid} | held.table())
        step = last_step(self._folder / "run" / "metrics.jsonl")
        self._records.add("sample", spent_s=self._spent_s, step=step, load=load(), processes=processes)

    def _kill(self, launcher: int, role: str) -> None:
        if last_step(self._folder / "run" / "metrics.jsonl") < 0:
            return
        victims = [process.pid for process in run_processes(launcher) if process.role == role]
        if role == "server":
            victims = [server[0] for server in servers_below(launcher)]
        if victims:
            victim = self._chance.choice(victims)
            self._records.add("fault", role=role, pid=victim, killed=kill(victim), spent_s=self._spent_s)

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """Asks the run to stop (it saves first), then sees that none of its processes is left."""
        tree = run_processes(process.pid)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            kill(process.pid)
            process.wait()
        left = end_all(tree, wait_s=_GONE_S)
        self._records.add("stopped", code=process.returncode, left=left, spent_s=self._spent_s)

    def _stop(self, number: int, frame: object) -> None:
        self._stopping = True


def _tail(log: Path) -> str:
    return log.read_bytes()[-4000:].decode(errors="replace")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 flat, 1 growth or a run that failed, 3 interrupted (start it again to go on)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hours", type=float, default=2.0, help="wall time of all launches together")
    parser.add_argument("--transport", choices=("disk", "distributed", "tensor"), default="disk")
    parser.add_argument("--servers", choices=("real", "double"), default="real", help="double: no model, for rehearsal")
    parser.add_argument("--sample-s", type=float, default=10.0)
    parser.add_argument("--server-kill-s", type=float, default=400.0, help="mean time between kills of a server")
    parser.add_argument("--verifier-kill-s", type=float, default=600.0, help="... of a verifier process")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--report", action="store_true", help="only write soak.md and soak.png")
    given = parser.parse_args(arguments)
    folder = given.out.absolute()
    if given.report:
        return write_report(folder)
    run_file = write_run(folder, name="soak", verifier="sometimes_slow", problems=PROBLEMS, more=SERVER_SECTIONS)
    options = {
        "run.num_steps": 1_000_000,
        "run.checkpoint_every": 50,
        "run.keep_checkpoints": 2,
        "rollout.engine": "sglang",
        "sglang.num_servers": 2,
        "sglang.python": servers_python(given.servers, folder),
        "sglang.transport": given.transport,
        "sglang.max_restarts": 1000,
        "rewards.timeout_s": 2.0,
    }
    soak = Soak(folder, given.hours, Pace(given.sample_s, given.server_kill_s, given.verifier_kill_s))
    code = soak.run(run_file, lambda: launch_command(run_file, options, ranks=given.ranks))
    return max(code, write_report(folder)) if code != 3 else 3


if __name__ == "__main__":
    sys.exit(main())

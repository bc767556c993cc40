"""One run that is launched again and again until it is done, while processes of it are killed.

Where it stands lies in FOLDER/state.json: which kills were made, what each of them hit, the seconds spent. A harness
that was interrupted ends what its launch left and starts the same command again.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.reliability.chaos_plan import ENDS_LAUNCH, Kill
from benchmarks.reliability.process_tree import RunProcess, end_all, kill, processes_naming, run_processes
from benchmarks.reliability.records import last_step, load
from tests.support.runs import ROOT, environment

_POLL_S = 0.02
_LOOK_S = 0.5  # between looks at all processes
_WATCH_S = 0.0005  # while a write or a transfer is waited for
_WATCH_LIMIT_S = 30.0  # ... which otherwise is a kill at a random moment
_STALLED_S = 900.0  # without a step: a hang
_GONE_S = 40.0  # ranks, workers and servers of a dead launcher
_START_SPAN_S = 12.0
_STEP_SPAN_S = 0.5
_WRITE_SPAN_S = 0.03
_MAX_QUICK_FAILURES = 5


@dataclass(frozen=True, slots=True)
class Launching:
    """How a run is started. ``command()`` is called for each launch; ``servers()`` are the pids of each server."""

    folder: Path  # holds run/ and state.json
    run_file: Path
    command: Callable[[], list[str]]
    servers: Callable[[], list[list[int]]]


class Stalled(RuntimeError):
    """The run made no step for a long time."""


class ChaosRun:
    """The run of a folder with its kills; none of them makes it the run to compare with."""

    def __init__(self, launching: Launching, kills: Sequence[Kill]) -> None:
        self._launching = launching
        self._kills = kills
        self._state_file = launching.folder / "state.json"
        self._output = launching.folder / "run"
        self.state: dict[str, Any] = {"kills": 0, "wall_s": 0.0, "launches": [], "faults": [], "done": False}
        if self._state_file.exists():
            self.state = json.loads(self._state_file.read_text("utf-8"))
        self._reached = -1  # the highest step seen
        self._progress_s = 0.0  # when it was
        self._looked_s = 0.0  # when the processes were last looked at
        self._began = self._launched_s = 0.0
        self._has_stepped, self._seen_step = False, -1  # of the launch

    def run(self) -> dict[str, Any]:
        """Returns the state once the run is done and all kills were made.

        Raises:
            Stalled: no step came for minutes; its processes are left as they are, to be looked at.
            RuntimeError: it ended by itself, unkilled, again and again.
        """
        failures = 0
        while not self.state["done"]:
            end_all(processes_naming(self._launching.run_file), wait_s=0.0)  # of a harness that was killed
            code, killed = self._launch()
            if code == 0:
                self.state["done"] = True
            elif not killed:
                failures += 1
                if failures >= _MAX_QUICK_FAILURES:
                    raise RuntimeError(f"{failures} launches ended by themselves; see {self._log()}")
            self._save()
        return self.state

    def _launch(self) -> tuple[int, bool]:
        """Returns (exit code, whether a kill was what ended it)."""
        with self._log().open("ab") as output:
            process = subprocess.Popen(
                self._launching.command(), cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, stdout=output,
                stderr=output, start_new_session=True,
            )  # fmt: skip
        launch = {"load": load(), "from_step": last_step(self._metrics()), "wall_s": self.state["wall_s"]}
        self._began = time.monotonic() - self.state["wall_s"]
        self._launched_s = self._wall_s()
        self._has_stepped, self._seen_step = False, last_step(self._metrics())
        tree: dict[int, RunProcess] = {}
        killed = self._make_kills(process, tree)
        while process.poll() is None:  # after the last kill, or one that ends the launch
            self._observe(process, tree)
            time.sleep(_POLL_S * 5)
        launch |= {"code": process.returncode, "killed": killed, "left": end_all(list(tree.values()), wait_s=_GONE_S)}
        self._observe(process, tree)
        self.state["wall_s"] = self._wall_s()
        self.state["launches"].append(launch)
        return process.returncode, killed

    def _make_kills(self, process: subprocess.Popen[bytes], tree: dict[int, RunProcess]) -> bool:
        """Returns whether a kill of this launch ends it; returns when one does, the kills are over, or the run is."""
        while self.state["kills"] < len(self._kills) and process.poll() is None:
            planned = self._kills[self.state["kills"]]
            self._observe(process, tree)
            is_first = not any(fault["launch"] == len(self.state["launches"]) for fault in self.state["faults"])
            seen = True
            if planned.moment == "start" and is_first and self.state["launches"]:
                time.sleep(planned.delay * _START_SPAN_S)
            elif self._reached + 1 < planned.step or (planned.victim == "server" and not self._has_stepped):
                # a run whose server ends while it starts ends with that server's log: that is not what is asked here
                time.sleep(_POLL_S)
                continue
            else:
                seen = self._await_moment(planned, process)
            victims = self._victims(planned, process.pid)
            if not self._kill(planned, victims, seen=seen):
                time.sleep(_POLL_S)  # it starts just now, or the run has ended
                continue
            if planned.victim in ENDS_LAUNCH:
                return True
        return False

    def _kill(self, planned: Kill, victims: Sequence[int], *, seen: bool) -> bool:
        """Returns whether there was something to kill; ``seen``: its moment, else it is a random one."""
        writing = self._writing()
        if not [victim for victim in victims if kill(victim)]:
            return False
        fault = {
            "step": planned.step, "victim": planned.victim, "moment": planned.moment if seen else "random",
            "wall_s": self._wall_s(), "at_step": self._reached + 1, "inside_write": bool(writing & self._writing()),
            "load": load(), "launch": len(self.state["launches"]), "recovered_s": None,
        }  # fmt: skip
        self.state["faults"].append(fault)
        self.state["kills"] += 1
        self.state["wall_s"] = self._wall_s()
        self._save()
        return True

    def _observe(self, process: subprocess.Popen[bytes], tree: dict[int, RunProcess]) -> None:
        """Takes note of processes and of the steps that were made."""
        step = last_step(self._metrics())
        now = self._wall_s()
        self._has_stepped |= step > self._seen_step  # less: a resumed run drops what it does again
        self._seen_step = step
        if step > self._reached:
            self._reached = step
            self._progress_s = now
            for fault in self.state["faults"]:
                again = fault["victim"] not in ENDS_LAUNCH or fault["launch"] < len(self.state["launches"])
                if fault["recovered_s"] is None and step >= fault["at_step"] and again:
                    fault["recovered_s"] = now
        if now - self._looked_s > _LOOK_S:
            self._looked_s = now
            tree.update({item.pid: item for item in run_processes(process.pid)})
        last_fault_s = self.state["faults"][-1]["wall_s"] if self.state["faults"] else 0.0
        if now - max(self._progress_s, last_fault_s, self._launched_s) > _STALLED_S:
            raise Stalled(f"no step beyond {self._reached} for {_STALLED_S:.0f} s; its processes are left as they are")

    def _await_moment(self, planned: Kill, process: subprocess.Popen[bytes]) -> bool:
        """Returns at the moment of the kill; False where what was waited for did not come."""
        if planned.moment not in ("checkpoint", "transfer"):
            time.sleep(planned.delay * _STEP_SPAN_S)
            return planned.moment == "random"
        look = self._writing if planned.moment == "checkpoint" else self._transferred
        before, deadline = look(), time.monotonic() + _WATCH_LIMIT_S
        while process.poll() is None and time.monotonic() < deadline:
            now = look()
            if now - before:
                time.sleep(planned.delay * _WRITE_SPAN_S)
                return True
            before = now
            time.sleep(_WATCH_S)
        return False

    def _victims(self, planned: Kill, launcher: int) -> list[int]:
        """Returns what to kill at once: one process, or all of a server's."""
        if planned.victim == "launcher":
            return [launcher]
        if planned.victim == "server":
            servers = self._launching.servers()
            place = planned.choice * len(servers)
            chosen = servers[int(place)] if servers else []
            return chosen if place % 1.0 < 0.5 else chosen[:1]
        found = [item.pid for item in run_processes(launcher) if item.role.removesuffix(" guard") == planned.victim]
        return [found[int(planned.choice * len(found))]] if found else []

    def _writing(self) -> set[str]:
        """Returns the checkpoints that are being written."""
        return {name for name in _names(self._output / "checkpoints") if "tmp" in name}

    def _transferred(self) -> set[str]:
        """Returns the folders of weights on their way to servers: one per launch, and in it one per version."""
        folder = self._output / "weights"
        return {f"{name}/{inner}" for name in _names(folder) for inner in ("", *_names(folder / name))}

    def _wall_s(self) -> float:
        return time.monotonic() - self._began

    def _metrics(self) -> Path:
        return self._output / "metrics.jsonl"

    def _log(self) -> Path:
        return self._launching.folder / "output.log"

    def _save(self) -> None:
        beside = self._state_file.with_suffix(".new")
        beside.write_text(json.dumps(self.state, indent=1) + "\n", "utf-8")
        os.replace(beside, self._state_file)


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []

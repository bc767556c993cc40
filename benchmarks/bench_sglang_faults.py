"""Two real SGLang servers are killed (SIGKILL) at twenty random moments of a run: what is lost, and how much time.

Run from the repository's root after `make quickstart` and tools/install_sglang_cpu.sh; writes sglang_faults.md.
    python -m benchmarks.bench_sglang_faults
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.support.real_servers import launch_arguments
from tests.support.runs import ROOT, metric_lines, train_command
from tests.support.server_kills import KilledRun, KillPlan, run_with_kills

RUN_FILE = ROOT / "examples" / "sglang_cpu" / "countdown.toml"
PROMPTS, GROUP_SIZE = 16, 8


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 where a sample was lost or counted twice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--scratch", type=Path, default=ROOT / "runs" / "bench_sglang" / "faults")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    shutil.rmtree(given.scratch, ignore_errors=True)
    wanted = given.steps * PROMPTS * GROUP_SIZE
    options = [
        "--parallel.tp=1",
        f"--rollout.prompts_per_step={PROMPTS}",
        f"--rollout.group_size={GROUP_SIZE}",
        f"--run.num_steps={given.steps}",
        "--run.checkpoint_every=0",
        '--report.sinks=["tensorboard"]',
        "--sglang.max_restarts=40",
        f"--run.output_dir={given.scratch}",
    ]
    killed = run_with_kills(
        train_command(RUN_FILE, *launch_arguments(), *options),
        given.scratch,
        KillPlan(2, given.kills, num_requests=wanted, seed=given.seed),
        variables={},
        limit_s=7200.0,
    )
    judged = sum(
        sum(count for name, count in line.items() if name.startswith("rewards/reason/"))
        for line in metric_lines(given.scratch)
    )
    text = report(killed, wanted, judged)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "sglang_faults.md").write_text(text, encoding="utf-8")
    print(text)
    return int(not killed.attempts == judged == wanted)


def report(killed: KilledRun, wanted: int, judged: int) -> str:
    """Returns the page."""
    lines = [
        "# Two real SGLang servers killed at random moments",
        "",
        "`python -m benchmarks.bench_sglang_faults`: examples/sglang_cpu with one training rank, 16 prompts x 8",
        "rollouts a step and the disk transport. A kill (SIGKILL) comes at a random answer to /generate and takes a",
        "server that serves: its main process alone or all of its processes. Time lost is what the steps with a kill",
        "took beyond the median of the others.",
        "",
        f"- {killed.summary()}",
        f"- samples wanted (steps x prompts x rollouts): {wanted}; judged: {judged}; counted by the ledger: "
        f"{killed.attempts}",
        "",
        "| kill | step | server | processes |",
        "|---|---|---|---|",
    ]
    for number, kill in enumerate(killed.kills):
        lines.append(f"| {number} | {kill.step} | {kill.server} | {'main' if kill.main_only else 'all'} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())

"""Twenty AER updates with two real SGLang servers on the CPU, once per weight transport, beside the embedded engine.

Run from the repository's root after `make quickstart` (it made the base policy) and tools/install_sglang_cpu.sh; writes
sglang.md and sglang.json into --out. The run is examples/sglang_cpu/countdown.toml with TP=2 training.
    python -m benchmarks.bench_sglang_runs

Every step measures, before its update, the largest and mean difference between the log-probability that the server
reported for a token and the trainer's own. After a run its last checkpoint is converted by the command-line tool and
its checksums are compared with those that both servers report. Servers on a CPU draw without a seed, so rewards
are compared as curves: the embedded engine runs with several seeds, and the spread of those is the noise.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aer_megatron.report.metrics import Metric
from aer_megatron.report.writer import read_metrics
from aer_megatron.sglang.server import ServerGroup
from tests.support.real_servers import export_last_checkpoint, real_server_options, served, served_difference
from tests.support.runs import ROOT, environment, train_command

RUN_FILE = ROOT / "examples" / "sglang_cpu" / "countdown.toml"
MODEL = ROOT / "runs" / "quickstart-base"
NUM_UPDATES = 20
TRANSPORTS = ("disk", "distributed", "tensor")
TAIL = 5  # steps over which the end of a curve is averaged


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 where served weights differ from the exported ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--scratch", type=Path, default=ROOT / "runs" / "bench_sglang")
    parser.add_argument("--seeds", type=int, default=3, help="runs of the embedded engine")
    given = parser.parse_args(arguments)
    runs: dict[str, dict[str, Any]] = {}
    with ServerGroup(2, real_server_options(MODEL, given.scratch / "logs")) as group:
        urls = group.start()
        for transport in TRANSPORTS:
            options = [f"--sglang.urls={json.dumps(urls)}", "--sglang.num_servers=0", f"--sglang.transport={transport}"]
            runs[transport] = measure(given.scratch / transport, options)
            runs[transport] |= check_served(given.scratch / transport, urls)
    for seed in range(given.seeds):
        name = f"embedded, seed {seed}"
        options = ["--rollout.engine=embedded", f"--run.seed={seed}"]
        runs[name] = measure(given.scratch / f"embedded-{seed}", options)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "sglang.json").write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    text = report(runs)
    (given.out / "sglang.md").write_text(text, encoding="utf-8")
    print(text)
    return int(any(run.get("difference") for run in runs.values()))


def measure(output: Path, options: Sequence[str]) -> dict[str, Any]:
    """Returns the curves of one run; one that is there is not repeated."""
    fixed = (
        f"--run.num_steps={NUM_UPDATES + 1}",  # the last step measures what the 20th update left
        "--run.checkpoint_every=0",
        "--report.sinks=[]",
        f"--run.output_dir={output}",
    )
    if not (output / "checkpoints").exists():
        done = subprocess.run(
            train_command(RUN_FILE, *fixed, *options, ranks=2),
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if done.returncode:
            sys.exit(done.stderr)
    table = read_metrics(output / "metrics.jsonl")
    names = {
        "reward": Metric.REWARD_MEAN,
        "logprob_diff_max": Metric.ROLLOUT_LOGPROB_DIFF_MAX,
        "logprob_diff_mean": Metric.ROLLOUT_LOGPROB_DIFF_MEAN,
        "step_s": Metric.TIME_STEP,
        "rollout_s": Metric.TIME_ROLLOUT,
        "sync_s": Metric.TIME_SYNC,
    }
    return {key: [float(str(line[name])) for line in table] for key, name in names.items()}


def check_served(output: Path, urls: list[str]) -> dict[str, Any]:
    """Returns the servers' versions and the first difference from the run's last checkpoint, "" where there is none."""
    ranks, versions = served(urls)
    exported = export_last_checkpoint(output, MODEL, output / "exported")
    differences = [served_difference(exported, of_server) for of_server in ranks]
    return {"difference": "; ".join(filter(None, differences)), "versions": versions, "tensors": len(exported.names())}


def report(runs: dict[str, dict[str, Any]]) -> str:
    """Returns the page."""
    lines = [
        "# Two real SGLang servers on the CPU, TP=2 training",
        "",
        f"`python -m benchmarks.bench_sglang_runs`: examples/sglang_cpu (64 prompts x 8 rollouts, fp32), {NUM_UPDATES}",
        f"updates. Reward: mean of the first and the last {TAIL} steps. Times are medians of a step, on a machine that",
        "did other work too.",
        "",
        "| rollouts | served = exported | max log-probability difference, step 0 | after 20 updates | reward, first |"
        " last | step, s | rollout, s | sync, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        equal = "-" if "difference" not in run else run["difference"] or f"all {run['tensors']} tensors"
        difference, reward = run["logprob_diff_max"], run["reward"]
        times = " | ".join(f"{np.median(run[key]):.2f}" for key in ("step_s", "rollout_s", "sync_s"))
        lines.append(
            f"| {name} | {equal} | {difference[0]:.1e} | {difference[-1]:.1e} | {np.mean(reward[:TAIL]):.3f} |"
            f" {np.mean(reward[-TAIL:]):.3f} | {times} |"
        )
    lines += ["", "Mean reward of every step:", ""]
    lines += ["| step | " + " | ".join(runs) + " |", "|---" * (len(runs) + 1) + "|"]
    for step in range(0, NUM_UPDATES + 1, 2):
        lines.append(f"| {step} | " + " | ".join(f"{run['reward'][step]:.3f}" for run in runs.values()) + " |")
    return "\n".join([*lines, "", verdict(runs), ""])


def verdict(runs: dict[str, dict[str, Any]]) -> str:
    """Returns how far the transports' curves are from the embedded engine's, in the latter's own spread."""
    embedded = np.array([run["reward"] for name, run in runs.items() if name not in TRANSPORTS])
    middle = embedded.mean(axis=0)
    noise = float(np.sqrt(embedded.var(axis=0, ddof=1).mean())) if len(embedded) > 1 else float("nan")
    words = [
        f"{name} {float(np.mean(np.array(runs[name]['reward']) - middle)):+.4f}" for name in TRANSPORTS if name in runs
    ]
    return (
        f"A step's reward scatters by {noise:.4f} between seeds of the embedded engine (standard deviation). Mean "
        f"distance of the servers' curves from its mean, over all steps: {', '.join(words)}."
    )


if __name__ == "__main__":
    sys.exit(main())

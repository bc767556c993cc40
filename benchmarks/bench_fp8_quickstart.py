"""The quick start under emulated FP8: is entropy held, and is the reward that of bf16?

Run from the repository's root after `make quickstart` (it made the base policy); writes fp8.md into --out and a picture
into docs/pictures. Runs that are there are not repeated; `--only-report` starts none.
    python -m benchmarks.bench_fp8_quickstart

One rank per run (`--parallel.tp=1`). Everything but the options below is examples/quickstart/countdown.toml; H_0 is
each run's own, measured by its own training forward pass. Columns, over the last third of the run:
  updates     optimizer steps per rollout batch; "corrected" ones with CORRECTION
  H / H*      mean over the steps
  deviation   largest |H / H* - 1| of a moving mean over 10 steps, and of any single step (sampling noise: about 4 %)
  reward      mean over the steps
  |dlogp|     mean |log-probability of the rollout engine (weights in bf16) - that of the trainer| of a sampled token
"""

from __future__ import annotations

import argparse
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aer_megatron.report.metrics import Metric, pass_at
from aer_megatron.report.picture import draw_comparison
from aer_megatron.report.writer import read_metrics
from aer_megatron.types import Float64Array
from benchmarks.quickstart_runs import finish_run, moving_mean

STEPS = 300
BF16 = ("--model.dtype=bf16",)
DELAYED = (
    *BF16,
    "--megatron.fp8=hybrid",
    "--megatron.fp8_recipe=delayed",
    "--megatron.fp8_amax_compute_algo=max",
)
PRECISIONS: dict[str, tuple[str, ...]] = {
    "bf16": BF16,
    "tensorwise": (*BF16, "--megatron.fp8=hybrid", "--megatron.fp8_recipe=tensorwise"),
    "blockwise": (*BF16, "--megatron.fp8=e4m3", "--megatron.fp8_recipe=blockwise"),
    "delayed": (*DELAYED, "--megatron.fp8_amax_history_len=1024"),
    "delayed, history 16": (*DELAYED, "--megatron.fp8_amax_history_len=16"),
}
CORRECTION = ("--algo.policy_loss.dual_clip=3", "--algo.correction.weight=token")
# an update after the first of a batch has ratios of two roundings of the weights, so that FP8 makes them noise
UPDATES: dict[str, tuple[str, ...]] = {
    "1": ("--algo.num_minibatches=1",),
    "2": ("--algo.num_minibatches=2",),
    "2, corrected": ("--algo.num_minibatches=2", *CORRECTION),
}


@dataclass(frozen=True, slots=True)
class Trial:
    """One run. Example: ``Trial("tensorwise", "1", seed=0)``."""

    precision: str
    updates: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.precision}-{self.updates}-{self.seed}".replace(", ", "-").replace(" ", "-")


# the seeds of bf16 are the noise that the recipes are compared with
TRIALS = (
    *(Trial("bf16", "1", seed) for seed in (0, 1, 2)),
    *(Trial(recipe, "1", seed) for recipe in list(PRECISIONS)[1:] for seed in (0, 1)),
    *(Trial("bf16", "2", seed) for seed in (0, 1, 2)),
    *(Trial(recipe, "2", 0) for recipe in ("tensorwise", "blockwise")),
    *(Trial(recipe, "2, corrected", 0) for recipe in ("tensorwise", "blockwise")),
)


def row(trial: Trial, folder: Path) -> str | None:
    """Returns the table row of a finished run, None of another."""
    path = folder / trial.name / "metrics.jsonl"
    records = read_metrics(path) if path.is_file() else []
    if len(records) <= STEPS:  # the last one is of evaluation alone
        return None
    third = records[:-1][-STEPS // 3 :]

    def series(name: str) -> Float64Array:
        return np.array([record[name] for record in third], dtype=np.float64)

    target = float(str(third[-1][Metric.ENTROPY_TARGET]))
    ratio = series(Metric.ENTROPY_TOKEN_MEAN) / target
    smooth = moving_mean(ratio)
    reward = series(Metric.REWARD_MEAN)
    cells = [
        trial.precision,
        trial.updates,
        f"{trial.seed}",
        f"{float(str(third[-1][Metric.ENTROPY_INITIAL])):.4f}",
        f"{target:.4f}",
        f"{ratio.mean():.3f}",
        f"{np.abs(smooth - 1).max():.3f}",
        f"{np.abs(ratio - 1).max():.3f}",
        f"{reward.mean():.3f} +- {reward.std() / np.sqrt(len(reward)):.3f}",
        *(f"{float(str(records[-1][pass_at('countdown', k)])):.3f}" for k in (1, 8, 32)),
        f"{series(Metric.ROLLOUT_LOGPROB_DIFF_MEAN).mean():.4f}",
    ]
    return "| " + " | ".join(cells) + " |"


def report(folder: Path, out: Path) -> str:
    """Returns the table, written to ``out``/fp8.md."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    lines = [
        "# The quick start under emulated FP8",
        "",
        "- command: `python -m benchmarks.bench_fp8_quickstart`",
        f"- commit: `{commit.stdout.strip()}`; columns: see the script's first lines; recipes: its `PRECISIONS`",
        "",
        "| precision | updates | seed | H_0 | H* | H / H* | deviation, mean of 10 | single step | reward | pass@1 "
        "| pass@8 | pass@32 | mean dlogp |",
        "|---" * 13 + "|",
    ]
    lines += [line for trial in TRIALS if (line := row(trial, folder)) is not None]
    text = "\n".join(lines) + "\n"
    (out / "fp8.md").write_text(text, encoding="utf-8")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/fp8"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--pictures", type=Path, default=Path("docs/pictures"))
    parser.add_argument("--only-report", action="store_true")
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    for trial in () if options.only_report else TRIALS:
        overrides = PRECISIONS[trial.precision] + UPDATES[trial.updates]
        finish_run(trial.name, options.runs, seed=trial.seed, num_steps=STEPS, overrides=overrides)
    print(report(options.runs, options.out))
    drawn = [trial for trial in TRIALS if trial.seed == 0 and trial.updates == "1" and "," not in trial.precision]
    folders = [options.runs / trial.name for trial in drawn if row(trial, options.runs) is not None]
    if folders:
        draw_comparison(folders, options.pictures / "fp8_quickstart.png")


if __name__ == "__main__":
    main()

"""How well each entropy rule holds its target on the quick start: deviation, overshoot, settling time, pass@k.

Run from the repository's root after `make quickstart` (it made the base policy); writes controllers.md into --out and
pictures into docs/pictures. Runs that are there are not repeated; `--only-report` starts none.
    python -m benchmarks.bench_controllers --jobs 2

One rank per run (`--parallel.tp=1`). Everything but the entropy rule is examples/quickstart/countdown.toml. Numbers are
of the entropy of each step's own rollouts. `single step` also holds the sampling noise of one batch (about 4 % of H* at
tau = 0.5: 64 prompts), which no rule can remove; the other columns are of a moving mean over 10 steps:
  deviation   largest |H / H* - 1| in the last half of the run
  below       how far H falls below H* after it first reaches it (the overshoot of a falling entropy)
  settled     first step from which H stays within 15 % of H* to the end
"""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aer_megatron.report.metrics import Metric, pass_at
from aer_megatron.report.picture import draw_comparison
from aer_megatron.report.writer import read_metrics
from benchmarks.quickstart_runs import WINDOW, finish_run, moving_mean

BAND = 0.15
TAUS = (0.3, 0.5, 0.7)
SEEDS = (0, 1, 2)
# tau = 0.3 is reached near step 350, the others before step 120; a coefficient that is too small takes time to show
STEPS, LONG_STEPS, COLLAPSE_STEPS = 300, 800, 600


@dataclass(frozen=True, slots=True)
class Trial:
    """One run: its folder's name, what it is called in the table, and its overrides of the run file."""

    name: str
    rule: str
    tau: float
    seed: int
    overrides: tuple[str, ...]
    num_steps: int = STEPS


def trials() -> list[Trial]:
    """Returns every run of the table."""
    rules = {
        "pi (the quick start's gains)": ("pi", ()),
        "proportional, eta 0.01": ("proportional", ("--algo.entropy.update=proportional", "--algo.entropy.eta=0.01")),
        "sign, eta 0.002": ("sign", ("--algo.entropy.update=sign", "--algo.entropy.eta=0.002")),
    }
    result = [
        Trial(
            f"{short}-{tau}",
            rule,
            tau,
            0,
            (f"--algo.entropy.tau={tau}", *overrides),
            STEPS if tau > min(TAUS) else LONG_STEPS,
        )
        for tau in reversed(TAUS)
        for rule, (short, overrides) in rules.items()
        if tau > min(TAUS) or short == "pi"  # a long run: only of the rule that is to hold it
    ]
    result += [
        Trial(f"pi-0.5-seed{seed}", next(iter(rules)), 0.5, seed, ("--algo.entropy.tau=0.5",)) for seed in SEEDS[1:]
    ]
    reference = "--algo.entropy.reference=0.5"
    none = ("--algo.entropy.kind=none", reference)
    result += [Trial(f"none-{seed}", "none (GRPO)", 0.5, seed, none) for seed in SEEDS]
    for coefficient, num_steps in ((0.7, STEPS), (0.007, COLLAPSE_STEPS)):
        fixed = ("--algo.entropy.kind=fixed", f"--algo.entropy.coefficient={coefficient}", reference)
        result += [
            Trial(f"fixed-{coefficient}-{seed}", f"fixed, {coefficient}", 0.5, seed, fixed, num_steps) for seed in SEEDS
        ]
    return result


def run(trial: Trial, folder: Path) -> None:
    """Returns when the run is finished; a finished one is left as it is."""
    finish_run(trial.name, folder, seed=trial.seed, num_steps=trial.num_steps, overrides=trial.overrides)


def row(trial: Trial, folder: Path) -> str | None:
    """Returns the table row of a run, None before its first steps."""
    path = folder / trial.name / "metrics.jsonl"
    found = read_metrics(path) if path.is_file() else []
    records = [record for record in found if Metric.REWARD_MEAN in record]  # the last one is of evaluation alone
    if len(records) < 2 * WINDOW:
        return None
    entropy = np.array([record[Metric.ENTROPY_TOKEN_MEAN] for record in records], dtype=np.float64)
    target = float(str(records[-1][Metric.ENTROPY_TARGET]))
    single = entropy / target - 1
    mean = moving_mean(entropy) / target - 1
    half = len(mean) // 2
    outside = np.flatnonzero(np.abs(mean) > BAND)
    settled = 0 if not len(outside) else int(outside[-1]) + WINDOW
    reached = np.flatnonzero(mean <= 0)
    below = -float(mean[reached[0] :].min()) if len(reached) else 0.0
    alarms = [str(record[Metric.AER_ALARM]).split(" at ")[0] for record in records if record.get(Metric.AER_ALARM)]
    alarm = f"{alarms[0]} ({len(alarms)} steps)" if alarms else "-"
    if len(records) < trial.num_steps:
        alarm = f"stopped after step {len(records) - 1}; {alarm}"
    last = found[-1]
    scores = [
        f"{float(str(last[pass_at('countdown', k)])):.3f}" if pass_at("countdown", k) in last else "-"
        for k in (1, 8, 32)
    ]
    cells = [
        trial.rule,
        f"{trial.tau}",
        f"{trial.seed}",
        f"{np.abs(mean[half:]).max():.3f}",
        f"{np.abs(single[len(single) // 2 :]).max():.3f}",
        f"{single[len(single) // 2 :].mean():+.3f}",
        f"{below:.3f}",
        "never" if settled >= len(records) else str(settled),
        *scores,
        alarm,
    ]
    return "| " + " | ".join(cells) + " |"


def report(all_trials: Sequence[Trial], folder: Path, out: Path) -> str:
    """Returns the table, written to ``out``/controllers.md."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True)
    lines = [
        "# Entropy rules on the quick start",
        "",
        "- command: `python -m benchmarks.bench_controllers`",
        f"- commit: `{commit.stdout.strip()}`; columns: see the script's first lines",
        "",
        "| rule | tau | seed | deviation | single step | mean | below | settled | pass@1 | pass@8 | pass@32 | alarm |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [line for trial in all_trials if (line := row(trial, folder)) is not None]
    text = "\n".join(lines) + "\n"
    (out / "controllers.md").write_text(text, encoding="utf-8")
    return text


def draw(folder: Path, pictures: Path) -> None:
    """Writes one picture of the three updates and one of the constant coefficients, where their runs are done."""
    pictures.mkdir(parents=True, exist_ok=True)
    for name, runs in {
        "updates.png": [f"{rule}-0.7" for rule in ("pi", "proportional", "sign")],
        "fixed.png": ["fixed-0.007-0", "pi-0.5", "fixed-0.7-0"],
    }.items():
        folders = [folder / run for run in runs]
        if all((path / "metrics.jsonl").is_file() for path in folders):
            draw_comparison(folders, pictures / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/controllers"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--pictures", type=Path, default=Path("docs/pictures"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one core each")
    parser.add_argument("--only-report", action="store_true")
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    if not options.only_report:
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda trial: run(trial, options.runs), trials()))
    print(report(trials(), options.runs, options.out))
    draw(options.runs, options.pictures)


if __name__ == "__main__":
    main()

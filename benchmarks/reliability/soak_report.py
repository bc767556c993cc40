"""Growth per 1,000 steps from the soak's records: a line through every process's samples, the table, the picture.

Every process has an intercept of its own and all processes of one kind and rank share the slope, so that a process that
was killed and started anew counts as what it is: a new one. The first steps of a process's life are its warm-up; that
of a rank goes on until servers have been started again twice: its pools of connections are as large as ever then.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.reliability.records import Records, machine

MEASURES = {"rss_kb": "resident, MB", "uss_kb": "private, MB", "descriptors": "descriptors", "threads": "threads"}
LIMIT_PERCENT = 1.0
WARM_UP_STEPS = {"launcher": 500, "rank": 500, "verifier guard": 100, "verifier": 100, "server": 200}
JUDGED = ("launcher", "rank", "verifier guard", "verifier")  # the servers are another project's; shown
_MIN_SAMPLES = 10
_WARM_UP_FAULTS = 2
_INTERVAL = 1.96


@dataclass(frozen=True, slots=True)
class Growth:
    """One measure of one kind of process. ``percent`` and ``error`` are per 1,000 steps, of the mean."""

    name: str
    measure: str
    num_processes: int
    num_samples: int
    num_steps: int  # covered by the samples of all its processes
    mean: float
    first: float
    last: float
    percent: float
    error: float  # half the width of the 95 % interval
    judged: bool

    @property
    def is_flat(self) -> bool:
        return abs(self.percent) < LIMIT_PERCENT or self.percent < 0


def growths(rows: Sequence[dict[str, Any]]) -> list[Growth]:
    """Returns the growth of every measure of every kind of process that was sampled long enough."""
    lives: dict[tuple[str, int], dict[tuple[int, int], list[dict[str, Any]]]] = {}
    launch = server_faults = 0
    for row in rows:
        launch += row["kind"] == "launch"
        server_faults = 0 if row["kind"] == "launch" else server_faults + (row.get("role") == "server")
        if row["kind"] == "sample" and row["step"] >= 0:
            for process in row["processes"]:
                kind = (process["role"], process["rank"] if process["role"] not in ("launcher", "server") else 0)
                life = lives.setdefault(kind, {}).setdefault((launch, process["pid"]), [])
                life.append(process | {"step": row["step"], "server_faults": server_faults})
    found = []
    for (role, rank), of_kind in sorted(lives.items()):
        name = role if role in ("launcher", "server") else f"{role} {rank}"
        faults = _WARM_UP_FAULTS if role == "rank" else 0
        warm = [_after_warm_up(life, WARM_UP_STEPS[role], faults) for life in of_kind.values()]
        warm = [life for life in warm if len(life) >= _MIN_SAMPLES]
        if warm:
            found += [_growth(name, measure, warm, judged=role in JUDGED) for measure in MEASURES]
    return found


def write_report(folder: Path) -> int:
    """Returns 0 where everything is flat, 1 elsewhere; writes soak.md and soak.png into ``folder``."""
    rows = Records(folder).rows
    table = growths(rows)
    (folder / "soak.md").write_text(page(rows, table), encoding="utf-8")
    draw(rows, folder / "soak.png")
    print(page(rows, table))
    return int(not table or not all(growth.is_flat for growth in table if growth.judged))


def page(rows: Sequence[dict[str, Any]], table: Sequence[Growth]) -> str:
    """Returns the Markdown text."""
    samples = [row for row in rows if row["kind"] == "sample"]
    launches = [row for row in rows if row["kind"] == "launch"]
    faults = Counter(row["role"] for row in rows if row["kind"] == "fault" and row["killed"])
    ended = [row["code"] for row in rows if row["kind"] == "ended"]
    left = [name for row in rows if row["kind"] == "stopped" for name in row["left"]]
    hours = max((row["spent_s"] for row in samples), default=0.0) / 3600.0
    steps = max((row["step"] for row in samples), default=-1) + 1
    lines = [
        "# Soak: memory, descriptors and threads over hours of training with servers, faults and saves",
        "",
        "`python -m benchmarks.reliability.soak --hours 2 --out FOLDER`: two training ranks under a launcher, two real",
        "SGLang servers on the CPU that the run launched, a checkpoint every 50 steps, the disk transport.",
        "",
        f"- commits: {', '.join(sorted({row['commit'] for row in launches})) or '-'}; machine: {machine()}, load",
        f"  {np.median([row['load'] for row in samples] or [math.nan]):.1f} (median; other work ran beside it)",
        f"- {hours:.2f} hours, {steps} steps, {len(launches)} launches; ended by itself: {ended or 'never'}; processes",
        f"  left behind by a stop: {', '.join(left) or 'none'}",
        f"- killed: {faults['server']} servers, {faults['verifier']} verifier processes; one verdict in 20,000 never",
        "  came",
        "",
        f"Growth is per 1,000 steps in % of the mean, with its 95 % interval; asked: below {LIMIT_PERCENT:g} %. The",
        f"first {WARM_UP_STEPS['rank']} steps of a rank or launcher (of a rank also what comes before two servers were",
        f"started again) and {WARM_UP_STEPS['verifier']} of a verifier process are left out. Servers are SGLang's own",
        "processes: shown, not judged.",
        "",
        "| process | what | lives | samples | steps | first | last | mean | growth, % | flat |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for item in table:
        unit = 1024.0 if item.measure.endswith("_kb") else 1.0
        values = " | ".join(f"{value / unit:.1f}" for value in (item.first, item.last, item.mean))
        verdict = ("yes" if item.is_flat else "NO") if item.judged else "-"
        lines.append(
            f"| {item.name} | {MEASURES[item.measure]} | {item.num_processes} | {item.num_samples} | {item.num_steps} |"
            f" {values} | {item.percent:+.2f} ± {item.error:.2f} | {verdict} |"
        )
    return "\n".join([*lines, ""])


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes the picture: every judged process over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(MEASURES), 1, figsize=(9, 11), sharex=True)
    series: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for row in rows:
        if row["kind"] == "sample" and row["step"] >= 0:
            for process in row["processes"]:
                if process["role"] in JUDGED:
                    name = process["role"] + (f" {process['rank']}" if process["rank"] >= 0 else "")
                    series.setdefault(name, []).append((row["step"], process))
    for axis, (measure, label) in zip(axes, MEASURES.items(), strict=True):
        unit = 1024.0 if measure.endswith("_kb") else 1.0
        for name, points in sorted(series.items()):
            axis.plot(
                [step for step, _ in points], [process[measure] / unit for _, process in points], ".",
                markersize=2, label=name,
            )  # fmt: skip
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
    axes[0].legend(fontsize="small", markerscale=4, ncols=3)
    axes[-1].set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _after_warm_up(life: list[dict[str, Any]], steps: int, faults: int) -> list[dict[str, Any]]:
    """Returns the samples beyond the first ``steps``, and beyond ``faults`` of servers where there were more."""
    most = max(sample["server_faults"] for sample in life)
    first = life[0]["step"] + steps
    return [sample for sample in life if sample["step"] >= first and sample["server_faults"] > min(faults, most) - 1]


def _growth(name: str, measure: str, lives: Sequence[Sequence[dict[str, Any]]], *, judged: bool) -> Growth:
    steps = [np.array([sample["step"] for sample in life], dtype=np.float64) for life in lives]
    values = [np.array([sample[measure] for sample in life], dtype=np.float64) for life in lives]
    mean = float(np.concatenate(values).mean())
    slope, error = pooled_slope(steps, values)
    scale = 1000.0 / mean * 100.0 if mean else 0.0
    return Growth(
        name=name,
        measure=measure,
        num_processes=len(lives),
        num_samples=sum(len(life) for life in lives),
        num_steps=int(sum(of_life[-1] - of_life[0] for of_life in steps)),
        mean=mean,
        first=float(values[0][0]),
        last=float(values[-1][-1]),
        percent=slope * scale,
        error=_INTERVAL * error * scale,
        judged=judged,
    )


def pooled_slope(steps: Sequence[NDArray[np.float64]], values: Sequence[NDArray[np.float64]]) -> tuple[float, float]:
    """Returns the least-squares slope that all series share, each with its own intercept, and its standard error."""
    x = np.concatenate([of_life - of_life.mean() for of_life in steps])
    y = np.concatenate([of_life - of_life.mean() for of_life in values])
    spread = float(x @ x)
    if not spread:
        return 0.0, 0.0
    slope = float(x @ y) / spread
    residual = y - slope * x
    degrees = max(1, len(x) - len(steps) - 1)
    return slope, math.sqrt(float(residual @ residual) / degrees / spread)

"""report.png: reward, pass@k, entropy against its target, and the coefficient, of one run or of several.

Drawn on a ``Figure`` of its own, never through pyplot, so that a training process has no drawing state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from aer_megatron.report.metrics import Metric, of_set, pass_at, pass_k
from aer_megatron.report.writer import METRICS_FILE, MetricValue, read_metrics, read_run_manifest
from aer_megatron.types import Float64Array

PICTURE_FILE = "report.png"
TARGET_BAND = 0.2  # the share of H* drawn around it: what the quick start promises to hold

_INK, _MUTED, _GRID, _ALARM = "#1f2933", "#7b8794", "#e4e7eb", "#c0392b"
_RUN_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe-Ito
_PASS_COLORS = ("#0b3c5d", "#0072b2", "#56b4e9", "#9ad1f5")
_PASS_STYLES = ("-", "--", ":", "-.")


@dataclass(frozen=True, slots=True)
class RunCurves:
    """One run, ready to draw: its label, its facts in words, and its records."""

    label: str
    facts: str
    records: Sequence[dict[str, MetricValue]]

    def series(self, name: str) -> tuple[Float64Array, Float64Array]:
        """Returns (steps, values) of the records that hold a number under ``name``."""
        points = [
            (float(record[Metric.STEP] or 0), float(value))
            for record in self.records
            if isinstance(value := record.get(name), (int, float))
        ]
        columns = np.array(points, dtype=np.float64).reshape(-1, 2)
        return columns[:, 0], columns[:, 1]

    @property
    def passes(self) -> list[tuple[str, int]]:
        """Returns (set, k) of every pass@k of the run, by set and k."""
        return sorted({place for record in self.records for name in record if (place := pass_k(name))})


def draw_report(run_folder: str | Path) -> Path:
    """Returns the path of the picture drawn from ``run_folder``/metrics.jsonl.

    Raises:
        ValueError: the folder holds no record of a step.
    """
    return draw_comparison([run_folder], Path(run_folder) / PICTURE_FILE)


def draw_comparison(run_folders: Sequence[str | Path], output: str | Path) -> Path:
    """Returns ``output``, the picture of one run, or of several laid over one another.

    Raises:
        ValueError: a folder holds no record of a step.
    """
    runs = load_runs(run_folders)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.10, wspace=0.04, hspace=0.05)
    figure = Figure(figsize=(11, 7.2), dpi=150, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    _title(figure, runs)
    grid = figure.add_gridspec(2, 2)
    _draw_reward(_panel(figure, grid[0, 0], "Mean reward"), runs)
    drawn = next((name for run in runs for name, _ in run.passes), None)
    _draw_pass(_panel(figure, grid[0, 1], f"Evaluation of {drawn}, pass@k" if drawn else "Evaluation"), runs, drawn)
    _draw_entropy(_panel(figure, grid[1, 0], "Token entropy (nats)"), runs)
    _draw_coefficient(figure, grid[1, 1], runs)
    last_step = max(float(run.records[-1][Metric.STEP] or 0) for run in runs)
    for axes in figure.axes:
        axes.set_xlim(-0.03 * max(last_step, 1), 1.03 * max(last_step, 1))
    figure.savefig(output)
    return Path(output)


def load_runs(run_folders: Sequence[str | Path]) -> list[RunCurves]:
    """Returns the runs in order; equal names are told apart by their folders.

    Raises:
        ValueError: a folder holds no record of a step.
    """
    runs: list[RunCurves] = []
    for folder in map(Path, run_folders):
        records = read_metrics(folder / METRICS_FILE)
        if not records:
            raise ValueError(f"{folder / METRICS_FILE} holds no step yet; draw after the first one")
        manifest = read_run_manifest(folder)
        label = str(manifest.get("name", folder.name))
        if label in {run.label for run in runs}:
            label = f"{label} ({folder.name})"
        runs.append(RunCurves(label, _facts(manifest), records))
    return runs


def smooth(values: Float64Array, width: int) -> Float64Array:
    """Returns the centred moving average over ``width`` values, over fewer of them near the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    start = np.maximum(index - width // 2, 0)
    end = np.minimum(index + width // 2 + 1, len(values))
    result: Float64Array = (sums[end] - sums[start]) / (end - start)
    return result


def _facts(manifest: dict[str, object]) -> str:
    config = manifest.get("config")
    if not isinstance(config, dict):
        return ""
    entropy = config["algo"]["entropy"]
    match entropy["kind"]:
        case "aer":
            facts = f"AER, {entropy['update']} update, $\\tau$ = {entropy['tau']:g}, $\\eta$ = {entropy['eta']:g}"
            if entropy["update"] == "pi":
                facts += f", $k_p$ = {entropy['k_p']:g}"
            return facts + (", shadow" if entropy["shadow"] else "")
        case "fixed":
            return f"fixed coefficient {entropy['coefficient']:g}"
        case "none":
            return "no entropy bonus"
        case kind:
            return str(kind)


def _title(figure: Figure, runs: Sequence[RunCurves]) -> None:
    text = runs[0].label if len(runs) == 1 else f"{len(runs)} runs"
    figure.suptitle(text, x=0.014, ha="left", fontsize=15, fontweight="bold", color=_INK)
    if len(runs) == 1:
        figure.text(0.986, 0.972, runs[0].facts, ha="right", va="top", fontsize=10.5, color=_MUTED)
        return
    lines = [Line2D([], [], color=color, linewidth=3) for color in _colors(runs)]
    names = [f"{run.label}: {run.facts}" if run.facts else run.label for run in runs]
    columns = 2 if max(map(len, names)) < 70 else 1
    figure.legend(lines, names, loc="outside lower left", ncols=columns, frameon=False, fontsize=9.5, labelcolor=_INK)


def _panel(figure: Figure, place: SubplotSpec, title: str, *, share: Axes | None = None) -> Axes:
    axes = figure.add_subplot(place, sharex=share)
    axes.set_title(title, loc="left", fontsize=11, color=_INK, fontweight="bold")
    style_axes(axes, num_ticks=6)
    return axes


def style_axes(axes: Axes, *, num_ticks: int) -> None:
    """Gives axes the look of every picture of a run: horizontal grid, no frame, whole steps below."""
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_GRID)
    axes.tick_params(colors=_MUTED, labelsize=9, length=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=num_ticks, integer=True))


def _colors(runs: Sequence[RunCurves]) -> list[str]:
    return [_RUN_COLORS[index % len(_RUN_COLORS)] for index in range(len(runs))]


def _draw_reward(axes: Axes, runs: Sequence[RunCurves]) -> None:
    for color, run in zip(_colors(runs), runs, strict=True):
        _draw_noisy(axes, *run.series(Metric.REWARD_MEAN), color)
    _finish(axes)


def _draw_pass(axes: Axes, runs: Sequence[RunCurves], drawn: str | None) -> None:
    """Draws pass@k of one set, of a run on its own with its intervals."""
    single = len(runs) == 1
    for color, run in zip(_colors(runs), runs, strict=True):
        for index, k in enumerate(k for name, k in run.passes if name == drawn):
            steps, values = run.series(pass_at(str(drawn), k))
            shade = _PASS_COLORS[index % len(_PASS_COLORS)] if single else color
            style = "-" if single else _PASS_STYLES[index % len(_PASS_STYLES)]
            axes.plot(steps, values, style, color=shade, marker="o", markersize=3.5, linewidth=1.8, label=f"pass@{k}")
            (low_steps, low), (_, high) = (
                run.series(of_set(str(drawn), f"pass@K_{end}", k)) for end in ("low", "high")
            )
            if single and low.size:
                axes.fill_between(low_steps, low, high, color=shade, alpha=0.12, linewidth=0)
    if axes.lines:
        axes.set_ylim(0, 1.02)
    _finish(axes, absent="no evaluation in this run")
    _legend_of_styles(axes, single=len(runs) == 1)


def _draw_entropy(axes: Axes, runs: Sequence[RunCurves]) -> None:
    single = len(runs) == 1
    for color, run in zip(_colors(runs), runs, strict=True):
        steps, entropy = run.series(Metric.ENTROPY_TOKEN_MEAN)
        _draw_noisy(axes, steps, entropy, color, label="$H$" if single else None)
        _draw_anchors(axes, run, color, single=single)
        alarms = {record[Metric.STEP] for record in run.records if record.get(Metric.AER_ALARM)}
        at_alarm = np.isin(steps, [float(step or 0) for step in alarms])
        if at_alarm.any():
            label = "alarm" if single else None
            axes.plot(steps[at_alarm], entropy[at_alarm], "x", color=_ALARM, markersize=6, label=label, zorder=4)
    _start_at_zero(axes)
    _finish(axes)
    if single:
        _legend(axes)


def _draw_anchors(axes: Axes, run: RunCurves, color: str, *, single: bool) -> None:
    """Draws H* (dashed) and, for a run on its own, the band around it and H_0."""
    _, targets = run.series(Metric.ENTROPY_TARGET)
    _, initials = run.series(Metric.ENTROPY_INITIAL)
    if targets.size:
        target = float(targets[-1])
        label = f"$H^*$ = {target:.3g}, ±{TARGET_BAND:.0%}" if single else None
        axes.axhline(target, color=_INK if single else color, linewidth=1.2, linestyle="--", label=label)
        if single:
            axes.axhspan(target * (1 - TARGET_BAND), target * (1 + TARGET_BAND), color=color, alpha=0.09, linewidth=0)
    if initials.size and single:
        initial = float(initials[-1])
        axes.axhline(initial, color=_MUTED, linewidth=1.2, linestyle=":", label=f"$H_0$ = {initial:.3g}")


def _draw_coefficient(figure: Figure, place: SubplotSpec, runs: Sequence[RunCurves]) -> None:
    rows = place.subgridspec(2, 1, height_ratios=(3, 2))
    top = _panel(figure, rows[0], r"Coefficient $\alpha$")
    bottom = _panel(figure, rows[1], "Mean difficulty d", share=top)
    for color, run in zip(_colors(runs), runs, strict=True):
        steps, alpha = run.series(Metric.AER_ALPHA)
        steps_used, used = run.series(Metric.AER_COEFFICIENT)
        top.plot(steps, alpha, color=color, linewidth=1.3, label=r"$\alpha$")
        if used.size and not used.any() and alpha.any():
            top.plot(steps_used, used, ":", color=color, linewidth=1.3, label="used by the loss")
            _legend(top)
        _draw_noisy(bottom, *run.series(Metric.AER_DIFFICULTY_MEAN), color)
    _start_at_zero(top)
    _start_at_zero(bottom)
    top.tick_params(labelbottom=False)
    _finish(top, absent="no controller in this run", label_steps=False)
    _finish(bottom)


def _draw_noisy(axes: Axes, steps: Float64Array, values: Float64Array, color: str, label: str | None = None) -> None:
    """Draws the values thin and their moving average over 5 % of the run bold."""
    if not values.size:
        return
    width = max(1, len(values) // 20)
    if width > 1:
        axes.plot(steps, values, color=color, linewidth=0.7, alpha=0.35)
    marker = "o" if len(values) < 3 else ""
    axes.plot(steps, smooth(values, width), color=color, linewidth=2.0, marker=marker, label=label)


def _start_at_zero(axes: Axes) -> None:
    largest = max((float(np.max(line.get_ydata())) for line in axes.lines if np.size(line.get_ydata())), default=0.0)
    top = 1.08 * largest if largest > 0 else 1e-3
    axes.set_ylim(-0.02 * top, top)  # a curve that stays at 0 must not hide behind the axis


def _finish(axes: Axes, *, absent: str = "not recorded", label_steps: bool = True) -> None:
    if not any(np.size(line.get_xdata()) for line in axes.lines):
        axes.text(0.5, 0.5, absent, transform=axes.transAxes, ha="center", va="center", fontsize=10, color=_MUTED)
        axes.set_yticks([])
    if label_steps:
        axes.set_xlabel("step", fontsize=9, color=_MUTED, loc="right")


def _legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(handles, labels, frameon=False, fontsize=9, labelcolor=_INK, loc="best")


def _legend_of_styles(axes: Axes, *, single: bool) -> None:
    """Adds one entry per pass@k; with several runs the colours belong to the runs, so entries are grey."""
    if single:
        _legend(axes)
        return
    styles = {str(line.get_label()): line.get_linestyle() for line in axes.lines}
    handles = [Line2D([], [], color=_MUTED, linestyle=style, linewidth=1.8) for style in styles.values()]
    if handles:
        axes.legend(handles, list(styles), frameon=False, fontsize=9, labelcolor=_INK, loc="best")

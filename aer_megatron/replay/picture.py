"""replay.png: entropy with both targets and both coefficients, of a recorded run and of a controller replayed on it.

Drawn on a ``Figure`` of its own, never through pyplot.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from aer_megatron.report.picture import style_axes
from aer_megatron.types import Float64Array

_INK, _MUTED, _WARNING = "#1f2933", "#7b8794", "#c0392b"
_RECORDED, _REPLAYED = "#0072b2", "#d55e00"  # Okabe-Ito
_CAVEAT = (
    "OPEN LOOP: H is the recorded run's. Under the replayed controller H would have been different, "
    "and with it every later step."
)


@dataclass(frozen=True, slots=True)
class ReplayTraces:
    """Both traces, one value per step; targets are NaN where there is none."""

    step: Float64Array
    token_entropy: Float64Array  # nats
    recorded_target: Float64Array
    replayed_target: Float64Array
    recorded_alpha: Float64Array
    replayed_alpha: Float64Array


def draw_replay(traces: ReplayTraces, output: str | Path, *, title: str, recorded: str, replayed: str) -> Path:
    """Returns ``output``, the picture of ``traces``; ``recorded`` and ``replayed`` name the two controllers."""
    layout = ConstrainedLayoutEngine(w_pad=0.14, h_pad=0.10, hspace=0.04, rect=(0, 0.045, 1, 0.85))
    figure = Figure(figsize=(10.5, 7.4), dpi=150, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    figure.text(0.014, 0.985, title, va="top", fontsize=15, fontweight="bold", color=_INK)
    figure.text(0.014, 0.943, f"recorded: {recorded}", va="top", fontsize=9.5, color=_RECORDED)
    figure.text(0.014, 0.917, f"replayed: {replayed}", va="top", fontsize=9.5, color=_REPLAYED)
    figure.text(0.014, 0.018, _CAVEAT, fontsize=9, color=_WARNING, fontweight="bold")
    top, bottom = (_panel(figure, row) for row in (1, 2))
    _draw_entropy(top, traces)
    _draw_alpha(bottom, traces)
    bottom.set_xlabel("step", fontsize=9, color=_MUTED, loc="right")
    figure.savefig(output)
    return Path(output)


def _panel(figure: Figure, row: int) -> Axes:
    axes = figure.add_subplot(2, 1, row)
    style_axes(axes, num_ticks=8)
    return axes


def _draw_entropy(axes: Axes, traces: ReplayTraces) -> None:
    axes.plot(traces.step, traces.token_entropy, color=_INK, linewidth=1.4, label="H, recorded")
    # the dashes of equal targets fall into each other's gaps
    for target, color, offset, label in (
        (traces.recorded_target, _RECORDED, 0, "target, recorded"),
        (traces.replayed_target, _REPLAYED, 4, "target, replayed"),
    ):
        axes.plot(traces.step, target, color=color, linewidth=1.6, linestyle=(offset, (4, 4)), label=label)
    _finish(axes, "Token entropy (nats)", traces.token_entropy, traces.recorded_target, traces.replayed_target)


def _draw_alpha(axes: Axes, traces: ReplayTraces) -> None:
    # the recorded trace is wide and pale, so that it stays in sight under an equal replayed one
    axes.plot(traces.step, traces.recorded_alpha, color=_RECORDED, linewidth=4.0, alpha=0.4, label="recorded")
    axes.plot(traces.step, traces.replayed_alpha, color=_REPLAYED, linewidth=1.4, label="replayed")
    _finish(axes, r"Coefficient $\alpha$", traces.recorded_alpha, traces.replayed_alpha)


def _finish(axes: Axes, title: str, *curves: Float64Array) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=_INK, fontweight="bold")
    values = np.concatenate(curves)
    largest = float(np.max(values, initial=0.0, where=np.isfinite(values)))
    top = 1.08 * largest if largest > 0 else 1e-3
    axes.set_ylim(-0.02 * top, top)  # a curve that stays at 0 must not hide behind the axis
    legend = axes.legend(frameon=False, fontsize=9, labelcolor=_INK, ncols=3, loc="lower right", borderaxespad=0.0)
    legend.set_bbox_to_anchor((1.0, 0.985))  # beside the title, off the curves

"""fp8_parity.png: what FP8 does to log-probabilities, layer by layer, and to the controller over a replayed run.

Drawn on a ``Figure`` of its own, never through pyplot.
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

from aer_megatron.report.picture import style_axes
from aer_megatron.types import Float64Array

_INK, _MUTED = "#1f2933", "#7b8794"
_COLORS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe-Ito


@dataclass(frozen=True, slots=True)
class PrecisionCurves:
    """One precision against the exact one (the first of a picture, whose differences are empty)."""

    name: str
    logprob_shift_T: Float64Array  # nats, signed
    layer_error: Float64Array  # relative error of each layer's output
    token_entropy: Float64Array  # nats, one per step; empty without a replayed run
    alpha: Float64Array
    target: float | None  # nats


def draw_fp8_parity(curves: Sequence[PrecisionCurves], output: str | Path, *, title: str) -> Path:
    """Returns ``output``, the picture of ``curves``; the first is the exact precision."""
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.10, wspace=0.04, hspace=0.05)
    figure = Figure(figsize=(10.5, 7.0), dpi=110, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.014, ha="left", fontsize=14, fontweight="bold", color=_INK)
    grid = figure.add_gridspec(2, 2)
    colors = dict(zip((curve.name for curve in curves), _COLORS, strict=False))
    _draw_shift(_panel(figure, grid[0, 0], "Share of tokens whose log-probability moves by more"), curves[1:], colors)
    _draw_layers(_panel(figure, grid[0, 1], "Relative error of a layer's output"), curves[1:], colors)
    _draw_trace(_panel(figure, grid[1, 0], "Token entropy and H* (nats), replayed run"), curves, colors, alpha=False)
    _draw_trace(_panel(figure, grid[1, 1], r"Coefficient $\alpha$, replayed run"), curves, colors, alpha=True)
    lines = [Line2D([], [], color=color, linewidth=3) for color in colors.values()]
    figure.legend(lines, list(colors), loc="outside lower left", ncols=6, frameon=False, fontsize=9.5, labelcolor=_INK)
    figure.savefig(output)
    return Path(output)


def _panel(figure: Figure, place: SubplotSpec, title: str) -> Axes:
    axes = figure.add_subplot(place)
    axes.set_title(title, loc="left", fontsize=11, color=_INK, fontweight="bold")
    style_axes(axes, num_ticks=6)
    return axes


def _draw_shift(axes: Axes, curves: Sequence[PrecisionCurves], colors: dict[str, str]) -> None:
    for curve in curves:
        shift = np.sort(np.abs(curve.logprob_shift_T))
        share = 1.0 - np.arange(len(shift)) / max(1, len(shift))
        axes.plot(shift, share, color=colors[curve.name], linewidth=1.6)
    axes.set_xscale("log")
    axes.set_xlim(left=1e-4)
    axes.tick_params(which="minor", length=0)
    _label(axes, "nats")


def _draw_layers(axes: Axes, curves: Sequence[PrecisionCurves], colors: dict[str, str]) -> None:
    for curve in curves:
        layers = np.arange(1, len(curve.layer_error) + 1)
        axes.plot(layers, curve.layer_error, color=colors[curve.name], marker="o", markersize=4, linewidth=1.6)
    axes.set_ylim(bottom=0)
    _label(axes, "layer")


def _draw_trace(axes: Axes, curves: Sequence[PrecisionCurves], colors: dict[str, str], *, alpha: bool) -> None:
    for curve in curves:
        values = curve.alpha if alpha else curve.token_entropy
        axes.plot(np.arange(len(values)), values, color=colors[curve.name], linewidth=1.4)
        if not alpha and curve.target is not None:
            axes.axhline(curve.target, color=colors[curve.name], linewidth=1.0, linestyle="--")
    _label(axes, "step")


def _label(axes: Axes, text: str) -> None:
    axes.set_xlabel(text, fontsize=9, color=_MUTED, loc="right")

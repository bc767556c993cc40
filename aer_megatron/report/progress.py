"""The display of a running job: a live table on a terminal, one plain line every few steps anywhere else.

This file does NOT decide who displays: that is the console sink, on rank 0.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from itertools import groupby
from typing import Protocol, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from aer_megatron.report.metrics import Metric, pass_at, pass_k
from aer_megatron.report.timer import PHASES
from aer_megatron.report.writer import MetricValue

Record = Mapping[str, MetricValue]

_ROWS = 12
_PLAIN_LINES = 40
_ETA_WINDOW = 50
_BAR_WIDTH = 40
_PASS_LABEL = "pass"  # of the first set and its smallest k; the line below the table has all
_PHASE_COLORS = ("cyan", "green", "yellow", "magenta", "blue", "red", "white")


class Progress(Protocol):
    """Shows normalised records, one per step."""

    def step(self, record: Record) -> None: ...

    def close(self) -> None: ...


class Pace:
    """The share of a run that is done and the time it still needs."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.step = -1
        self._durations_s: deque[float] = deque(maxlen=_ETA_WINDOW)

    def add(self, record: Record) -> None:
        self.step = int(number(record, Metric.STEP))
        duration_s = number(record, Metric.TIME_STEP)
        if math.isfinite(duration_s):
            self._durations_s.append(duration_s)

    @property
    def remaining_s(self) -> float:
        """Returns the mean of the latest step times, times the steps left; NaN before the first step."""
        if not self._durations_s:
            return math.nan
        return sum(self._durations_s) / len(self._durations_s) * max(self.num_steps - self.step - 1, 0)

    def __str__(self) -> str:
        if self.step < 0:
            return f"waiting for the first of {self.num_steps} steps"
        done = min(self.step + 1, self.num_steps)
        return f"{done}/{self.num_steps} steps · {duration(self.remaining_s)} left"


class PlainProgress:
    """Writes one line for some 40 of the run's steps, and for every step with an evaluation or an alarm."""

    def __init__(self, num_steps: int, *, stream: TextIO | None = None) -> None:
        self._console = Console(file=stream, soft_wrap=True, highlight=False, markup=False, color_system=None)
        self._pace = Pace(num_steps)
        self._every = plain_interval(num_steps)

    def step(self, record: Record) -> None:
        first = self._pace.step < 0
        self._pace.add(record)
        last = self._pace.step == self._pace.num_steps - 1
        notable = first or last or bool(record.get(Metric.AER_ALARM)) or _has_evaluation(record)
        if notable or self._pace.step % self._every == 0:
            self._console.print(plain_line(record, str(self._pace)))

    def close(self) -> None:
        pass


class LiveProgress:
    """Redraws a table of the latest steps, the time per phase, the controller's word and the latest alarm."""

    def __init__(self, name: str, num_steps: int, *, console: Console) -> None:
        self._name = name
        self._pace = Pace(num_steps)
        self._records: deque[Record] = deque(maxlen=_ROWS)
        self._pass_at: Record = {}
        # Drawn by step() alone: a refresh thread would compete with the ranks for the cores.
        self._live = Live(self._render(), console=console, auto_refresh=False)
        self._live.start(refresh=True)

    def step(self, record: Record) -> None:
        self._pace.add(record)
        self._records.append(record)
        self._pass_at = {name: value for name, value in record.items() if pass_k(name)} or self._pass_at
        self._live.update(self._render(), refresh=True)

    def close(self) -> None:
        self._live.stop()

    def _render(self) -> RenderableType:
        parts: list[RenderableType] = []
        if self._records:
            latest = self._records[-1]
            parts = [step_table(list(self._records)), Text(), phase_bar(latest)]
            if self._pass_at:
                parts.append(_labelled("last evaluation", _pass_text(self._pass_at)))
            if latest.get(Metric.AER_REASON):
                parts.append(_labelled("controller", str(latest[Metric.AER_REASON])))
            alarms = [record[Metric.AER_ALARM] for record in self._records if record.get(Metric.AER_ALARM)]
            if alarms:
                parts.append(Text(f"ALARM  {alarms[-1]}", style="bold red"))
        title = Text.assemble((self._name, "bold"), f" · {self._pace}")
        return Panel(Group(*parts), title=title, title_align="left", border_style="dim", padding=(0, 1))


def open_progress(name: str, num_steps: int) -> Progress:
    """Returns the display that fits standard output: live on a terminal, plain lines otherwise."""
    console = Console()
    if console.is_terminal:
        return LiveProgress(name, num_steps, console=console)
    return PlainProgress(num_steps)


def plain_interval(num_steps: int) -> int:
    """Returns the smallest of 1, 2, 5, 10, 20, 50, ... that makes at most 40 lines of ``num_steps`` steps."""
    scale = 1
    while True:
        for digit in (1, 2, 5):
            if digit * scale * _PLAIN_LINES >= num_steps:
                return digit * scale
        scale *= 10


def number(record: Record, name: str) -> float:
    """Returns a numeric metric, NaN where the record lacks it."""
    value = record.get(name)
    return float(value) if isinstance(value, (int, float)) else math.nan


def duration(seconds: float) -> str:
    """Returns ``45s``, ``4m 05s`` or ``3h 20m``; ``?`` for a time that is not known."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


def plain_line(record: Record, pace: str) -> str:
    """Returns one step in one line; columns that the record lacks are left out."""
    cells = [f"{label} {show(record)}" for label, show, _ in _PLAIN_COLUMNS if show(record)]
    if _has_evaluation(record):
        cells.append(_pass_text(record))
    phases = [f"{name} {number(record, metric):.2f}s" for name, metric in PHASES.items() if metric in record]
    lines = [" | ".join([f"step {record[Metric.STEP]}", pace, *cells, *phases])]
    if record.get(Metric.AER_REASON):
        lines.append(f"    controller: {record[Metric.AER_REASON]}")
    if record.get(Metric.AER_ALARM):
        lines.append(f"    ALARM: {record[Metric.AER_ALARM]}")
    return "\n".join(lines)


def step_table(records: list[Record]) -> Table:
    """Returns a table with one row per record and the columns that at least one record can fill."""
    columns = [column for column in _COLUMNS if any(column[1](record) for record in records)]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for label, _, style in columns:
        table.add_column(label, justify="right", no_wrap=True, style=style)
    for record in records:
        row_style = "red" if record.get(Metric.AER_ALARM) else None
        table.add_row(*(show(record) or "·" for _, show, _ in columns), style=row_style)
    return table


def phase_bar(record: Record) -> Text:
    """Returns the time per phase of one step: a bar of their shares and the seconds of each."""
    seconds = {name: number(record, metric) for name, metric in PHASES.items() if metric in record}
    total = sum(seconds.values())
    colors = dict(zip(PHASES, _PHASE_COLORS, strict=True))
    bar, legend = Text(), Text()
    for name, value in seconds.items():
        share = value / total if total > 0 else 0.0
        bar.append("━" * round(share * _BAR_WIDTH), style=colors[name])
        legend.append(f"  {name} ", style=colors[name]).append(f"{value:.2f}s")
    return Text("time  ", style="dim").append_text(bar).append_text(legend) if seconds else Text()


def _labelled(label: str, text: str) -> Text:
    return Text.assemble((f"{label}  ", "dim"), text)


def _cell(name: str, spec: str) -> Callable[[Record], str]:
    def show(record: Record) -> str:
        value = number(record, name)
        return format(value, spec) if math.isfinite(value) else ""

    return show


def _entropy_cell(record: Record) -> str:
    entropy, target = number(record, Metric.ENTROPY_TOKEN_MEAN), number(record, Metric.ENTROPY_TARGET)
    if not math.isfinite(entropy):
        return ""
    return f"{entropy:.3f}/{target:.3f}" if math.isfinite(target) else f"{entropy:.3f}"


def _has_evaluation(record: Record) -> bool:
    return any(pass_k(name) for name in record)


def _pass_text(record: Record) -> str:
    """Returns ``aime24 pass@1 0.200 pass@8 0.740; math500 ...``, in the order of names and of k."""
    found = sorted((place, number(record, name)) for name in record if (place := pass_k(name)))
    sets = groupby(found, key=lambda item: item[0][0])
    return "; ".join(" ".join([name, *(f"pass@{k} {value:.3f}" for (_, k), value in group)]) for name, group in sets)


def _first_pass(record: Record) -> str:
    first = min((place for name in record if (place := pass_k(name))), default=None)
    return f"{number(record, pass_at(*first)):.3f}" if first else ""


_COLUMNS: tuple[tuple[str, Callable[[Record], str], str], ...] = (
    ("step", _cell(Metric.STEP, ".0f"), "dim"),
    ("loss", _cell(Metric.LOSS_SUPERVISED, ".4f"), ""),
    ("reward", _cell(Metric.REWARD_MEAN, ".3f"), "bold"),
    (_PASS_LABEL, _first_pass, "green"),
    ("H/H*", _entropy_cell, ""),
    ("alpha", _cell(Metric.AER_ALPHA, ".5f"), ""),
    ("mean d", _cell(Metric.AER_DIFFICULTY_MEAN, ".2f"), ""),
    ("tokens/s", _cell(Metric.TIME_TOKENS_PER_S, ".0f"), ""),
    ("step s", _cell(Metric.TIME_STEP, ".2f"), "dim"),
)
# The plain line opens with the step and spells every pass@k of an evaluation itself.
_PLAIN_COLUMNS = tuple(column for column in _COLUMNS if column[0] not in ("step", _PASS_LABEL))

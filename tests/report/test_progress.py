"""The display: what a terminal and a log file show of the same steps."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
from rich.console import Console

from aer_megatron.report.progress import (
    LiveProgress,
    Pace,
    PlainProgress,
    duration,
    plain_interval,
)


def record(step: int, **extra: Any) -> dict[str, Any]:
    return {
        "step": step,
        "reward/mean": 0.4125,
        "entropy/token_mean": 0.31,
        "entropy/target": 0.36,
        "aer/alpha": 0.0034,
        "aer/difficulty_mean": 0.62,
        "aer/reason": "alpha 0.0031 -> 0.0034: H 0.31 below target 0.36",
        "aer/alarm": None,
        "time/step_s": 2.0,
        "time/rollout_s": 1.5,
        "time/train_s": 0.5,
        "time/tokens_per_s": 5123.4,
        **extra,
    }


def plain(records: list[dict[str, Any]], num_steps: int) -> list[str]:
    stream = io.StringIO()
    progress = PlainProgress(num_steps, stream=stream)
    for item in records:
        progress.step(item)
    progress.close()
    return stream.getvalue().splitlines()


def live(records: list[dict[str, Any]], num_steps: int) -> str:
    """Returns the last frame as plain text."""
    stream = io.StringIO()
    console = Console(file=stream, width=140, height=60, force_terminal=True, color_system=None)
    progress = LiveProgress("demo", num_steps, console=console)
    for item in records:
        stream.seek(0)
        stream.truncate()
        progress.step(item)
    progress.close()
    return stream.getvalue()


def test_a_log_line_shows_everything_on_one_line() -> None:
    out = plain([record(0, **{"eval/a/pass@8": 0.74, "eval/a/pass@1": 0.2, "eval/b/pass@16": 0.5})], 300)
    assert out == [
        "step 0 | 1/300 steps · 9m 58s left | reward 0.412 | H/H* 0.310/0.360 | alpha 0.00340 | "
        "mean d 0.62 | tokens/s 5123 | step s 2.00 | a pass@1 0.200 pass@8 0.740; b pass@16 0.500 | rollout 1.50s | "
        "train 0.50s",
        "    controller: alpha 0.0031 -> 0.0034: H 0.31 below target 0.36",
    ]


def test_a_log_has_a_line_every_few_steps_and_at_every_event() -> None:
    extras: dict[int, dict[str, Any]] = {33: {"eval/a/pass@1": 0.2}, 44: {"aer/alarm": "collapse at step 44"}}
    out = plain([record(step, **extras.get(step, {})) for step in range(399)], 399)
    shown = [int(line.split()[1]) for line in out if line.startswith("step ")]
    assert shown == sorted({*range(0, 399, 10), 33, 44, 398})
    assert "    ALARM: collapse at step 44" in out


def test_a_resumed_log_starts_with_the_step_it_resumes_at() -> None:
    out = plain([record(step) for step in range(123, 130)], 1000)
    assert out[0].startswith("step 123 |")
    assert "    controller: alpha 0.0031 -> 0.0034: H 0.31 below target 0.36" in out


@pytest.mark.parametrize(
    ("num_steps", "interval"), [(1, 1), (40, 1), (41, 2), (80, 2), (200, 5), (201, 10), (5000, 200)]
)
def test_the_interval_is_a_round_number_that_keeps_a_log_short(num_steps: int, interval: int) -> None:
    assert plain_interval(num_steps) == interval


def test_the_live_panel_shows_state_phases_reason_and_alarm() -> None:
    records = [record(0, **{"eval/a/pass@1": 0.2, "eval/a/pass@32": 0.96})]
    records += [record(step) for step in range(1, 5)]
    records += [record(5, **{"aer/alarm": "entropy collapse at step 5"})]
    frame = live(records, 300)
    for text in (
        "demo · 6/300 steps · 9m 48s left",
        "0.310/0.360",
        "0.00340",
        "5123",
        "rollout 1.50s",
        "train 0.50s",
        "last evaluation  a pass@1 0.200 pass@32 0.960",
        "controller  alpha 0.0031 -> 0.0034: H 0.31 below target 0.36",
        "ALARM  entropy collapse at step 5",
    ):
        assert text in frame


def test_an_alarm_leaves_the_panel_with_its_row() -> None:
    records = [
        record(0, **{"aer/alarm": "entropy collapse at step 0"}),
        *(record(step) for step in range(1, 12)),
    ]
    assert "ALARM" in live(records, 300)
    assert "ALARM" not in live([*records, record(12)], 300)


def test_the_supervised_stage_shows_its_loss_and_no_empty_columns() -> None:
    frame = live([{"step": 0, "loss/supervised": 1.2345, "time/step_s": 1.0}], 10)
    assert "1.2345" in frame
    assert "reward" not in frame
    assert "alpha" not in frame


def test_text_in_brackets_is_shown_as_it_is() -> None:
    reason = "alpha [bold]0.1[/bold] held"
    assert reason in live([record(0, **{"aer/reason": reason})], 2)
    assert f"    controller: {reason}" in plain([record(0, **{"aer/reason": reason})], 2)


def test_a_metric_that_was_not_finite_is_left_out() -> None:
    out = plain([record(0, **{"reward/mean": None, "entropy/token_mean": None})], 2)
    assert "reward" not in out[0]
    assert "H/H*" not in out[0]


def test_the_time_left_is_the_mean_step_times_the_steps_left() -> None:
    pace = Pace(10)
    assert math.isnan(pace.remaining_s)
    pace.add({"step": 0, "time/step_s": 3.0})
    pace.add({"step": 1, "time/step_s": 1.0})
    assert pace.remaining_s == 2.0 * 8
    pace.add({"step": 10, "time/step_s": 1.0})  # a line after the last update, for the final evaluation
    assert pace.remaining_s == 0.0
    assert str(pace).startswith("10/10 steps")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.4, "59s"), (59.6, "1m 00s"), (245, "4m 05s"), (12000, "3h 20m"), (math.nan, "?")],
)
def test_durations_read_like_a_clock(seconds: float, text: str) -> None:
    assert duration(seconds) == text

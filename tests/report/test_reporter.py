"""The reporter as the training loop sees it, its timer, and the event file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from aer_megatron.config import Config
from aer_megatron.report.reporter import NullReporter, Reporter, StepReporter
from aer_megatron.report.timer import PHASES, PhaseTimer, peak_rss_gb
from aer_megatron.report.writer import read_metrics


def config(**report: Any) -> Config:
    return Config.from_table({"model": {"path": "base"}, "data": {"train": {"task": "countdown"}}, "report": report})


def open_reporter(folder: Path, start_step: int, **report: Any) -> Reporter:
    return Reporter.open(config(**report), folder=folder, num_steps=10, start_step=start_step)


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_a_step_reaches_the_file_the_events_the_display_and_the_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_reporter(tmp_path, 0) as reporter:
        reporter.step({"step": 0, "reward/mean": 0.25, "aer/held": False, "aer/alarm": None})
        reporter.step({"step": 1, "reward/mean": 0.5, "aer/held": True, "aer/alarm": "collapse at step 1"})
        assert not (tmp_path / "report.png").exists()
    assert [line["reward/mean"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0.25, 0.5]
    assert scalars(tmp_path, "reward/mean") == [(0, 0.25), (1, 0.5)]
    assert scalars(tmp_path, "aer/held") == [(0, 0.0), (1, 1.0)]
    out = capsys.readouterr().out
    assert "reward 0.250" in out
    assert "ALARM: collapse at step 1" in out
    assert (tmp_path / "report.png").is_file() and (tmp_path / "report.html").is_file()


def test_every_part_can_be_switched_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_reporter(tmp_path, 0, sinks=[], picture=False, html=False) as reporter:
        reporter.step({"step": 0, "reward/mean": 0.25})
    assert capsys.readouterr().out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_resumed_run_replaces_the_steps_it_makes_again(tmp_path: Path) -> None:
    with open_reporter(tmp_path, 0, sinks=["tensorboard"], picture=False) as reporter:
        for step in range(4):
            reporter.step({"step": step, "reward/mean": 0.25 * step})
    with open_reporter(tmp_path, 2, sinks=["tensorboard"], picture=False) as reporter:
        reporter.step({"step": 2, "reward/mean": 8.0})
    assert [line["reward/mean"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0.0, 0.25, 8.0]
    assert scalars(tmp_path, "reward/mean") == [(0, 0.0), (1, 0.25), (2, 8.0)]


def test_a_run_that_starts_anew_in_a_used_folder_leaves_no_old_step(tmp_path: Path) -> None:
    for value in (0.5, 0.75):
        with open_reporter(tmp_path, 0, sinks=[], picture=False, html=False) as reporter:
            reporter.step({"step": 0, "reward/mean": value})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 0, "reward/mean": 0.75}]


def test_an_error_ends_the_display_and_is_not_hidden_by_a_picture(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="gone"), open_reporter(tmp_path, 0, sinks=["tensorboard"]) as reporter:
        reporter.step({"step": 0, "reward/mean": 0.25})
        raise RuntimeError("the server is gone")
    assert not (tmp_path / "report.png").exists() and not (tmp_path / "report.html").exists()
    assert scalars(tmp_path, "reward/mean") == [(0, 0.25)]


def test_a_run_without_a_step_closes_without_a_picture(tmp_path: Path) -> None:
    reporter = open_reporter(tmp_path, 0, sinks=[])
    reporter.close()
    reporter.close()
    assert list(tmp_path.iterdir()) == []


def test_the_silent_reporter_does_nothing_with_the_same_interface(tmp_path: Path) -> None:
    reporter: StepReporter = NullReporter()
    with reporter:
        reporter.step({"no": "metric"})
    reporter.close()
    real: StepReporter = open_reporter(tmp_path, 0, sinks=[])
    assert {name for name in dir(StepReporter) if not name.startswith("_")} <= set(dir(real))


def ticking(*times: float) -> Any:
    ticks: Iterator[float] = iter(times)
    return lambda: next(ticks)


def test_phases_add_up_and_start_over_at_take() -> None:
    # start 0; rollout 1..3 and 4..4.5; train 5..9; taken at 10; then sync 11..12, taken at 20
    timer = PhaseTimer(clock=ticking(0, 1, 3, 4, 4.5, 5, 9, 10, 11, 12, 20))
    for name in ("rollout", "rollout", "train"):
        with timer.phase(name):
            pass
    first = timer.take(num_tokens=1000)
    with timer.phase("sync"):
        pass
    second = timer.take()
    assert first.pop("time/peak_rss_gb") > 0
    assert first == {
        "time/rollout_s": 2.5,
        "time/train_s": 4.0,
        "time/step_s": 10.0,
        "time/tokens_per_s": 100.0,
    }
    assert second.pop("time/peak_rss_gb") > 0
    assert second == {"time/sync_s": 1.0, "time/step_s": 10.0}


def test_a_phase_that_fails_is_counted_and_left() -> None:
    timer = PhaseTimer(clock=ticking(0, 1, 3, 4, 5, 6))
    with pytest.raises(RuntimeError, match="gone"), timer.phase("rollout"):
        raise RuntimeError("the server is gone")
    with timer.phase("eval"):
        pass
    metrics = timer.take()
    assert (metrics["time/rollout_s"], metrics["time/eval_s"]) == (2.0, 1.0)


def test_an_unknown_or_nested_phase_is_refused() -> None:
    timer = PhaseTimer()
    with (
        pytest.raises(ValueError, match="unknown phase 'sleep'; use one of rollout, reward"),
        timer.phase("sleep"),
    ):
        pass
    nested = pytest.raises(AssertionError, match="phase train inside phase rollout")
    with nested, timer.phase("rollout"), timer.phase("train"):
        pass


def test_every_phase_is_a_metric_of_the_machine() -> None:
    assert all(str(name).startswith("time/") for name in PHASES.values())


def test_the_peak_memory_is_in_gigabytes_and_covers_what_was_touched() -> None:
    block = np.ones(64_000_000, dtype=np.float64)
    assert block.nbytes / 1e9 <= peak_rss_gb() <= 64

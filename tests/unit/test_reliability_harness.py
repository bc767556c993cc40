"""The arithmetic of benchmarks/reliability: what the soak calls growth, and when the chaos kills are due."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.reliability.soak_report import growths, pooled_slope


def samples(pid: int, steps: range, **values: Any) -> list[dict[str, Any]]:
    """Returns the soak's rows of one rank's life; a value may be a function of the step."""
    rows = []
    for step in steps:
        held = {name: value(step) if callable(value) else value for name, value in values.items()}
        process = {"role": "rank", "rank": 0, "pid": pid, "uss_kb": 1000, "descriptors": 20, "threads": 4} | held
        rows.append({"kind": "sample", "step": step, "spent_s": float(step), "load": 1.0, "processes": [process]})
    return rows


def test_growth_is_per_thousand_steps_of_the_mean_after_the_warm_up() -> None:
    # 1 MB at step 500, 2 kB a step from there on; what it did before step 500 does not count
    rows = samples(7, range(0, 1501, 10), rss_kb=lambda step: 1e6 + 2 * (step - 500) if step >= 500 else 5e5)
    by_measure = {item.measure: item for item in growths(rows)}
    assert by_measure["rss_kb"].percent == pytest.approx(2000 / (1e6 + 1000) * 100)
    assert by_measure["rss_kb"].error == pytest.approx(0.0, abs=1e-6)
    assert by_measure["rss_kb"].is_flat and by_measure["descriptors"].percent == 0.0


def test_a_leak_of_descriptors_is_not_flat() -> None:
    rows = samples(7, range(0, 3001, 10), rss_kb=1e6, descriptors=lambda step: 20 + step // 1000)
    (descriptors,) = [item for item in growths(rows) if item.measure == "descriptors"]
    assert not descriptors.is_flat


def test_a_restarted_process_is_a_new_one() -> None:
    # two flat lives at different heights: a line through both would climb
    rows = [*samples(7, range(0, 1001, 10), rss_kb=1000000.0), {"kind": "launch", "spent_s": 0.0}]
    rows += samples(8, range(1000, 2001, 10), rss_kb=2e6)
    (rss,) = [item for item in growths(rows) if item.measure == "rss_kb"]
    assert (rss.percent, rss.num_processes) == (0.0, 2)


def test_the_slope_of_series_with_their_own_intercepts() -> None:
    x = np.arange(5.0)
    slope, error = pooled_slope([x, x + 10], [3.0 * x + 1, 3.0 * x - 50])
    assert (slope, error) == (pytest.approx(3.0), pytest.approx(0.0, abs=1e-12))

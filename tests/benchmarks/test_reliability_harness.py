"""The arithmetic of benchmarks/reliability: growth in the soak, when kills are due, what a fault cost, fuzz batches."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.reliability.chaos_plan import draw_kills, lost_seconds
from benchmarks.reliability.chaos_report import differences
from benchmarks.reliability.fuzz import Fuzz, Limits
from benchmarks.reliability.fuzz_files import ledgers
from benchmarks.reliability.fuzz_mutators import mutate_json
from benchmarks.reliability.fuzz_report import keep, kept_inputs
from benchmarks.reliability.fuzz_worker import Batch, finding
from benchmarks.reliability.soak_report import growths, pooled_slope
from benchmarks.reliability.xxh64 import xxh64


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


@pytest.mark.parametrize("engine", ["embedded", "sglang"])
def test_kills_are_drawn_once_and_all_fall_inside_the_run(engine: str) -> None:
    kills = draw_kills(60, num_steps=240, engine=engine, seed=3)
    steps = [kill.step for kill in kills]
    assert kills == draw_kills(60, num_steps=240, engine=engine, seed=3)
    assert len(set(steps)) == 60 and steps == sorted(steps) and steps[0] > 0 and steps[-1] < 216
    victims, moments = {kill.victim for kill in kills}, {kill.moment for kill in kills}
    assert victims == {"rank", "verifier", "launcher"} | ({"server"} if engine == "sglang" else set())
    assert moments == {"random", "start", "checkpoint"} | ({"transfer"} if engine == "sglang" else set())
    with pytest.raises(ValueError, match="--steps 60 is too few for --kills 60"):
        draw_kills(60, num_steps=60, engine=engine, seed=3)


def test_seconds_lost_end_with_recovery_or_the_next_fault() -> None:
    faults = [
        {"wall_s": 10.0, "recovered_s": 15.0},
        {"wall_s": 20.0, "recovered_s": 40.0},
        {"wall_s": 30.0, "recovered_s": 40.0},
        {"wall_s": 50.0, "recovered_s": None},
    ]
    assert lost_seconds(faults, step_s=1.0) == [4.0, 9.0, 9.0, 0.0]


def test_a_difference_names_what_differs() -> None:
    assert differences("metrics", {0: {"a": 1.0}}, {0: {"a": 1.0}}) == []
    (line,) = differences("metrics", {0: {"a": 1.0, "b": 2}}, {0: {"a": 1.5, "b": 2}, 1: {}})
    assert line == "metrics 0 (and 1 more): {'a': 1.0} was {'a': 1.5} with kills"


def test_a_fuzz_run_goes_on_with_what_is_not_done(tmp_path: Path) -> None:
    fuzz = Fuzz(tmp_path, 0, Limits(5.0, 10**9), 1)
    fuzz.state["done"] = {"ledger": [[5000, 5100], [0, 1500]]}
    assert fuzz._batches("ledger", 10_200) == [
        Batch("ledger", 1500, 5000),
        Batch("ledger", 5100, 10_100),
        Batch("ledger", 10_100, 10_200),
    ]


def test_findings_are_kept_one_of_a_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.reliability.fuzz_report.SEEDS", tmp_path / "seeds")
    (tmp_path / "findings").mkdir()
    for index, text in enumerate(["KeyError: 1\nwriter.py:f", "KeyError: 2\nwriter.py:f", "TypeError: 3\nwriter.py:f"]):
        row = finding("metrics", 0, index, "raised", text, b"{}")
        (tmp_path / "findings" / f"metrics-{index}.json").write_text(json.dumps(row))
    assert (keep(tmp_path), keep(tmp_path)) == (2, 0)
    assert list(kept_inputs()) == [
        ("metrics", "KeyError writer.py:f", b"{}"),
        ("metrics", "TypeError writer.py:f", b"{}"),
    ]


def test_mutations_are_repeatable_and_mostly_change_something() -> None:
    valid = b'{"a": [1, 2.5, {"b": "text"}], "c": true}'
    damaged = [mutate_json(valid, random.Random(seed)) for seed in range(200)]
    assert damaged == [mutate_json(valid, random.Random(seed)) for seed in range(200)]
    assert len(set(damaged) - {valid}) > 150


def test_xxh64_of_known_texts() -> None:
    # of the specification's reference implementation
    assert xxh64(b"") == 0xEF46DB3751D8E999
    assert xxh64(b"abc") == 0x44BC2CF5AD770999
    for content in ledgers():  # more than 32 bytes, and the C++ side's own checksum
        assert xxh64(content[:-8]) == int.from_bytes(content[-8:], "little")
